"""Training detectors, `python -m revbifpn_kernels.detect`. See docs/detection.md.

options.py   options of the command; defaults that depend on the data
scenes.py    the built-in data: handwritten digits on photographs, as COCO annotations
coco.py      COCO annotations, checked: what is used, what is left out, and why
outlines.py  their polygons and run lengths, checked before pycocotools reads them
data.py      images and targets by key, from scenes or folders
networks.py  Faster R-CNN and Mask R-CNN on a RevBiFPN's pyramid
state.py     a run between two steps
loop.py      steps and evaluations
evaluate.py  average precision, as pycocotools counts it
report.py    precision.csv, the last line
draw.py      a figure of predictions beside the truth
memory.py    memory of a backbone, compared with ResNet-50-FPN and HRNet-W18
session.py   a whole run, put together
"""
