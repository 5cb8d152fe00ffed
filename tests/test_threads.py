"""Planning and converting in some threads, a model that serves in another: nobody notices anybody."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import convsurgery as cs

NAMES = ("test_resnet", "test_efficientnet", "test_vit")


def _together(count: int, act: Callable[[int], object]) -> list[BaseException]:
    """Run ``act`` in so many threads at once; what they raised."""
    raised: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            act(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize(("threads", "times"), [(2, 6), (12, 1)])
def test_planning_disturbs_nobody(threads: int, times: int) -> None:
    served, x = timm.create_model("test_byobnet").eval(), torch.randn(1, 3, 64, 64)
    models = [timm.create_model(name).eval() for name in NAMES]
    rule = "all-conv->kerv-poly by copy"
    wanted = [cs.plan(model, rule) for model in models]
    with torch.no_grad():
        answer = served(x)
    before = nn.Module.__call__, nn.Module.__getattr__, list(warnings.filters)
    level = logging.getLogger("torch._subclasses.fake_tensor").level
    stop, served_times = threading.Event(), [0]

    def serve(_: int) -> None:
        with torch.no_grad():
            while not stop.is_set():
                assert torch.equal(served(x), answer)
                served_times[0] += 1

    def plan(number: int) -> None:
        for turn in range(times):
            which = (number + turn) % len(models)
            assert cs.plan(models[which], rule) == wanted[which]

    failures: list[BaseException] = []
    server = threading.Thread(target=lambda: failures.extend(_together(1, serve)))
    server.start()
    planned = _together(threads, plan)
    stop.set()
    server.join()
    assert not planned
    assert not failures
    assert served_times[0] > 0
    # Nothing is left behind in the process.
    assert (nn.Module.__call__, nn.Module.__getattr__, list(warnings.filters)) == before
    assert logging.getLogger("torch._subclasses.fake_tensor").level == level


def test_converting_in_threads_gives_what_one_thread_gives() -> None:
    model = timm.create_model("test_resnet").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = cs.convert(model, "all-conv->kerv-poly")(x)

    def convert(_: int) -> None:
        with torch.no_grad():
            assert torch.equal(cs.convert(model, "all-conv->kerv-poly")(x), wanted)

    assert not _together(4, convert)


def test_a_model_that_does_not_trace_leaves_everything_as_it_was() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > -1e9 else x

    before = nn.Module.__call__, nn.Module.__getattr__, list(warnings.filters)
    assert len(cs.plan(Odd(), "conv->kerv-poly by copy", example_inputs=torch.rand(1, 3, 8, 8)).edits) == 1
    assert (nn.Module.__call__, nn.Module.__getattr__, list(warnings.filters)) == before
