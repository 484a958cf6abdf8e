"""Where a test's body runs: on the CPU always, which proves the body; on GPUs where they are."""

import pytest
import torch

GPUS = torch.cuda.device_count()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device")]
ON_TWO = [pytest.mark.multigpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")]


def on(*devices):
    """A parameter of a test: the devices that it computes on, with the marks that they need."""
    marks = ON_GPU if "cuda" in devices else []
    return pytest.param(*devices, id="-".join(devices), marks=marks)
