"""What every training run needs, written once for classify/ and detect/.

command.py     runs a command, and prints an error as one line
errors.py      the error that a user can correct
options.py     fields as command-line options, shared options, what may change on resume
networks.py    freezing, settings of a model, hints about files of weights
images.py      opens image files, or says why one cannot be used
samples.py     splits, replacements for unreadable files, loaders
order.py       which sample is in which step: a function of seed and step alone
processes.py   torchrun, DDP, FSDP2; what all processes must agree on
checkpoint.py  files that are whole or absent; the states of random number generators
state.py       a run between two steps: captured, restored
clock.py       wall and CPU time, and how they are added to a run
loop.py        steps, evaluations, checkpoints, losses that are not finite
signals.py     SIGTERM, SIGINT, and loaders that ignore them
tables.py      CSV files that continue when a run is resumed; peak memory
console.py     the terminal: progress bar, rows, warnings, how a run stopped
session.py     the folder of a run, its beginning and its end
"""
