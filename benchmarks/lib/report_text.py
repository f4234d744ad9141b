"""What the report says in words."""

TITLE = """# Training steps and their memory, measured

Written by `make report` from the CSVs in `results/`; no number is typed. Losses stand beside wins.
"""

HOW_COUNTED = """
- *Memory* is on top of parameters, gradients and momentum. *Held* stays between forward and
  backward, *peak* is the most at any moment of a step, *transient* the difference, *state* is
  parameters, gradients and momentum of SGD. *What an image adds* is the slope between batches of
  two and four (128 and 256 against depth), so that what does not grow with it cancels. Counted
  on fake tensors, allocation by allocation; workspaces inside operators are not in it, in real
  steps they are.
- *A step* is forward, backward and update by SGD with momentum; medians, in turns in one run.
  Before timing, gradients of all modes are compared with those of stored activations.
- *GMACs* are multiply-adds of convolutions and matrix products; the README's are `thop`'s, as the
  authors publish them, which counts norms and enlargements too.
- The paper measured a GPU's allocator, and another EfficientNet; both of ours are counted alike.
- Levels of a profile leave out Python and the engine, and what works on weights.
- *Launches*: kernels on a GPU, on a CPU operators that compute or copy; forward and backward.
- *Of the roof*: the least time over the median. The least time is the sum over convolutions and
  matrix products of a step with stored activations of FLOPs over the fastest matrix product or
  inputs and outputs over the fastest copy, whichever is longer, both measured in the same run. To
  compute again counts as no work.
- Dropout and stochastic depth are 0 in all networks. EfficientNet and HRNet are timm's; the BiFPN
  is `bifpn.py`, of EfficientDet-D0's shape; *official* is the authors' code.
""".lstrip()

GRAPHED_STEP = """A whole training step fits in a CUDA graph, because nothing in it waits for the
device (`tests/test_reversible_cuda.py` captures one). That takes Python and launches out of the
steps of small models:

```python
with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):  # after three steps on a side stream
    loss = F.cross_entropy(model(image), labels)
    loss.backward()
    optimizer.step()  # gradients zeroed with set_to_none=True before the capture
graph.replay()  # one launch a step: copy the next batch into `image` and `labels` before
```"""
