"""One launch for a whole training step on a GPU."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StepGraphs:
    """A training step that a GPU replays as a CUDA graph, one for each shape of the batch.

    A step of a small network is some hundred kernels of microseconds each, which the GPU runs
    faster than Python can launch them; a graph launches all at once. The first step of a shape runs
    as written, which makes the optimiser's state and chooses kernels; the second is recorded.

    Args:
        step: of inputs, labels and learning rate (a number on the device); reads nothing back.
        device: the GPU.
    """

    def __init__(self, step: Callable[[Tensor, Tensor, Tensor], Any], device: torch.device):
        self.step = step
        self.lr = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream()  # what is recorded must not be the main stream
        self.pool = torch.cuda.graph_pool_handle()  # the graphs run in turn, in the same memory
        self.recorded: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Any]] = {}
        self.seen: set[torch.Size] = set()

    def __call__(self, x: Tensor, labels: Tensor, lr: float) -> Any:
        """Takes the step; what it returns is overwritten by the next one."""
        self.lr.fill_(lr)
        if x.shape not in self.seen:
            self.seen.add(x.shape)
            return self._as_written(x, labels)
        if x.shape not in self.recorded:
            x, labels, graph = x.clone(), labels.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                result = self.step(x, labels, self.lr)
            self.recorded[x.shape] = graph, x, labels, result
        graph, own_x, own_labels, result = self.recorded[x.shape]
        own_x.copy_(x)
        own_labels.copy_(labels)
        graph.replay()
        return result

    def _as_written(self, x: Tensor, labels: Tensor) -> Any:
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True")  # it is going to be
            result = self.step(x, labels, self.lr)
        main.wait_stream(self.stream)
        return result


def launched_at_once(
    step: Callable[[Tensor, Tensor, Any], Any], device: torch.device
) -> Callable[[Tensor, Tensor, float], Any]:
    """Makes a step of inputs, labels and learning rate cheap to launch on this device."""
    return StepGraphs(step, device) if device.type == "cuda" else step
