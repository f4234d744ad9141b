"""Options of a command: fields that become switches, checks, and what may change on resume."""

import argparse
import ast
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, get_args

from .errors import RunError


class Range(NamedTuple):
    """The values that an option may have: a test, and words for messages."""

    holds: Callable[[Any], bool]
    text: str


def whole_from(least: int) -> Range:
    return Range(lambda v: v >= least, f"a whole number from {least} on")


FROM_0, FROM_1 = whole_from(0), whole_from(1)
POSITIVE = Range(lambda v: 0 < v < math.inf, "a positive number")
NOT_NEGATIVE = Range(lambda v: 0 <= v < math.inf, "a number from 0 on")
BELOW_1 = Range(lambda v: 0 <= v < 1, "in [0, 1)")
PROBABILITY = Range(lambda v: 0 <= v <= 1, "in [0, 1]")


def option(
    default, help: str, allowed: Range | None = None, *, defaults=(), may_change=False, **argument
) -> Any:
    """Returns a field. Its annotation is the type for argparse; a bool gives --name and --no-name.

    `argument` is what `add_argument` takes beyond that.
    """
    metadata = {"help": help, "allowed": allowed, "argument": argument}
    metadata |= {"defaults": defaults, "may_change": may_change}
    return dataclasses.field(default=default, metadata=metadata)


def by_data(on_digits, on_own_data, help: str, allowed: Range | None = None, **argument) -> Any:
    """An option whose default depends on the data; None: that data has no default."""
    return option(None, help, allowed, defaults=(on_digits, on_own_data), **argument)


# An option that may change when a run is resumed, because it does not affect the run's numbers.
changeable = functools.partial(option, may_change=True)


def settings_of(on_digits: tuple) -> dataclasses.Field:
    """`--set`, by default with the settings of the model for digits."""
    text = "a field of the model's Config, such as extra_silos=1; may be repeated"
    return by_data(on_digits, (), text, type=setting, action="append")


def power(text: str) -> float:
    """ "2^-12", "2**-12" or "0.000244140625"."""
    base, _, exponent = text.replace("**", "^").partition("^")
    try:
        return float(base) ** int(exponent) if exponent else float(base)
    except (ValueError, OverflowError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number such as 2^-12, got {text!r}") from None


def setting(text: str) -> tuple[str, Any]:
    """ "widths=48,64,80,160" → ("widths", (48, 64, 80, 160))."""
    name, separator, value = text.partition("=")
    try:
        if not separator:
            raise ValueError
        return name.strip().replace("-", "_"), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(
            f"expected NAME=NUMBERS, such as widths=48,64,80,160, got {text!r}"
        ) from None


METAVARS = {int: "N", float: "X", power: "X", setting: "NAME=VALUE"}  # placeholders in the help


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def switch(name: str) -> str:
    return "--set" if name == "settings" else "--" + name.replace("_", "-")


@dataclass(frozen=True)
class RunOptions:
    """The options that both commands have. None: a default that depends on the data."""

    DATA: ClassVar[tuple[str, str]]  # names of the built-in data and of a user's

    checkpoint: str | None = option(
        None, "file with the model's weights to start from: ours, official or safetensors"
    )
    lattice: float | None = option(None, "exact mode, such as 2^-12", type=power)
    reversible: bool = option(True, "recompute activations in the backward, or store them")
    device: str = option("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    out: str | None = changeable(None, "folder of the run; runs/NAME-TIME unless given")
    resume: str = changeable(
        "never", "auto continues the run in --out if there is one", choices=("never", "auto")
    )
    checkpoint_minutes: float = changeable(
        5.0, "minutes between checkpoints; 0: after each step", NOT_NEGATIVE
    )
    log_every: int = changeable(10, "steps per row of steps.csv", FROM_1)
    progress: bool = changeable(True, "a progress bar on terminals")

    @property
    def dataset(self) -> str:
        return self.DATA[0] if self.data is None else self.DATA[1]

    def fixed_on_resume(self) -> dict[str, Any]:
        """The options that a checkpoint saves: all that affect the run's numbers."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if not f.metadata["may_change"]}


def fields_of(options: type[RunOptions]) -> dict[str, dataclasses.Field]:
    """All fields by name: the command's own first, then those of `RunOptions`."""
    fields = dataclasses.fields(options)
    own = options.__annotations__
    return {field.name: field for field in sorted(fields, key=lambda f: f.name not in own)}


def parsed(
    command: str, description: str, options: type[RunOptions], arguments: Sequence[str] | None
) -> RunOptions:
    """The options on the command line, with None where the data decides; not yet checked."""
    parser = argparse.ArgumentParser(
        prog=f"python -m revbifpn_kernels.{command}",
        usage="%(prog)s [options], all of which --help explains",
        description=description,
    )
    for name, field in fields_of(options).items():
        kind = next(iter(get_args(field.type)), field.type)  # of int | None: int
        argument = {"type": kind} | field.metadata["argument"]
        argument["metavar"] = METAVARS.get(argument["type"])
        if kind is bool:
            argument = {"action": argparse.BooleanOptionalAction}
        text = field.metadata["help"] + _shown_default(field, options.DATA)
        parser.add_argument(switch(name), dest=name, default=field.default, help=text, **argument)
    return options(**vars(parser.parse_args(arguments)))


def _shown_default(field: dataclasses.Field, data: tuple[str, str]) -> str:
    """The default as --help shows it; empty if the help text names it."""
    if field.name == "settings" or field.default == () or field.default is False:
        return ""
    if field.default is not None:
        return f" (default: {field.default})"
    found = zip(field.metadata["defaults"], data, strict=False)
    texts = [f"{value} for {name}" for value, name in found if value is not None]
    return f" (default: {', '.join(texts)})" if texts else ""


def defaults_of(options: RunOptions) -> dict[str, Any]:
    """The data's defaults of options that are None; settings belong to the default model."""
    which = options.DATA.index(options.dataset)
    defaults = {
        field.name: field.metadata["defaults"][which]
        for field in dataclasses.fields(options)
        if field.metadata["defaults"]
    }
    found = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    settings = dict(defaults["settings"]) if options.model is None else {}
    found["settings"] = tuple(sorted((settings | dict(options.settings or ())).items()))
    return found | {"model": options.model or "revbifpn_s0"}


def check(options: RunOptions) -> None:
    """Raises `RunError` for the first option that is out of its range."""
    for field in dataclasses.fields(options):
        value, allowed = getattr(options, field.name), field.metadata["allowed"]
        if allowed is not None and value is not None and not allowed.holds(value):
            raise RunError(f"{switch(field.name)} must be {allowed.text}, got {value}")
    if options.resume == "auto" and not options.out:
        raise RunError("--resume auto needs --out, the folder of the run; got none")


def refuse_changes(before: dict[str, Any], now: dict[str, Any], fields: Sequence[str]) -> None:
    """Raises `RunError` where a run is resumed with other options; the message lists them."""
    if lines := _differences(before, now, fields):
        raise RunError(
            "--resume auto continues a run with the options that it was started with, got other "
            "options; start anew in another --out, or take back:\n  " + "\n  ".join(lines)
        )


def _differences(before: dict, now: dict, fields: Sequence[str]) -> list[str]:
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "settings":
            lines += _differences(dict(old or ()), dict(new or ()), fields)
        else:
            shown = switch(name) if name in fields else name
            lines.append(f"{shown}: {old} in the checkpoint, {new} now")
    return lines
