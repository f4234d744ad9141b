"""Detection from the command line, `python -m revbifpn_kernels.detect`: one file an idea.

    options.py      what can be asked for
    scenes.py       the embedded default: handwritten digits on photographs, as COCO annotations
    coco.py         COCO annotations, checked: what can be trained on, and what is left out and why
    outlines.py     their polygons and run lengths, checked before pycocotools reads them
    data.py         images and targets by key, of scenes and of folders
    networks.py     Faster R-CNN and Mask R-CNN on a RevBiFPN's pyramid
    run.py          all that a run is between two steps: made, captured, restored
    loop.py         steps, signals, losses that are not finite, checkpoints
    evaluate.py     average precision, as pycocotools counts it
    report.py       progress bar, CSV, the last line
    draw.py         a picture of predictions beside the truth
    memory.py       bytes a backbone holds, beside ResNet-50-FPN and HRNet-W18
    session.py      a whole run, put together

`docs/detection.md` is written for users. Files, order and signals are those of `recipes/run`.
"""
