"""Training from the command line, `python -m revbifpn_kernels.train`: one file an idea.

    options.py     what can be asked for; which answers may not change in mid-run
    pictures.py    a file becomes pixels, whatever it holds, or a reason why not
    data.py        digits, folders of pictures, their split; a sample by its key
    augment.py     torchvision's transforms
    order.py       which sample stands where in which step: a function of seed and step alone
    networks.py    the model by name, its norms, frozen parts, weights to start from
    processes.py   torchrun, DDP, FSDP2; what ranks must agree on
    optimizers.py  timm's, if a checkpoint holds all of their state; the learning rate's schedule
    checkpoint.py  a file that is whole or was never there, and when; generators of random numbers
    state.py       all that a run is between two steps: captured, restored
    signals.py     SIGTERM, SIGINT, and processes that outlive them
    loop.py        steps, evaluations, losses that are not finite
    evaluate.py    loss and accuracy of images that are not trained on
    console.py     the terminal: progress bar, warnings once each, how a run stopped
    report.py      CSV, TensorBoard, the picture, the last line
    export.py      ONNX and torch.export, checked against the network

`docs/` has pages for users: training, scaling, finetuning.
"""
