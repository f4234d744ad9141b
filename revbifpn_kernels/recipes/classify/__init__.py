"""Training classifiers, `python -m revbifpn_kernels.train`. See docs/training.md.

options.py     options of the command; defaults that depend on the data
data.py        digits, folders of images, their split; a sample by its key
augment.py     torchvision's transforms
networks.py    the model by name, its norms, weights to start from
optimizers.py  timm's, if a checkpoint holds all of their state; the learning rate's schedule
state.py       a run between two steps
loop.py        steps and validations
evaluate.py    loss and accuracy of images that are not trained on
report.py      epochs.csv, TensorBoard, the figure, the last line
export.py      ONNX and torch.export, checked against the network
session.py     a whole run, put together
"""
