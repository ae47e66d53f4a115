"""Plans: what they depend on, what their steps make, and that a launch goes past the look-up from its second time on."""

from __future__ import annotations

from typing import Any

import torch

from lightning_compile.kernels.plan import MOST, TURNS, Plan, Plans, signature


def test_a_plan_depends_on_geometry_and_alignment_and_on_no_value() -> None:
    x = torch.zeros(64)
    assert signature((x, None)) == signature((torch.ones(64), None))
    assert signature((x,)) != signature((x[::2],)) != signature((x[:32],))
    assert signature((x[:32],)) != signature((x[1:33],))  # four bytes off
    assert signature((x[:32],)) == signature((x[4:36],))
    assert signature((x,)) != signature((x.double(),)) != signature((None,))


def test_steps_make_the_tensors_that_their_buffers_say() -> None:
    given = torch.randn(2, 3, 4, 5).transpose(1, 2)
    plan = Plan(given.device)
    x = plan.given(given)
    assert x is not None and not x.contiguous
    plan.given(None)
    empty = plan.empty((2, 3, 4, 5), torch.float64, lengthwise=True)
    double = plan.compute((2, 4, 3, 5), torch.float32, lambda t: 2 * t, x)
    turned = plan.transpose(double)
    nothing = plan.nothing(torch.float16)
    plan.results = [empty, double, turned, nothing]
    for _ in range(2):
        made = plan((given, None))
        for buffer, tensor in zip(plan.results, made):
            assert (tuple(tensor.shape), tensor.stride(), tensor.dtype) == (buffer.shape, buffer.strides, buffer.dtype)
        torch.testing.assert_close(made[1], 2 * given)
    plan.release(double)
    assert made[2].data_ptr() == made[1].data_ptr()


class Kernel:
    """What a launch needs of a Triton kernel; compiled calls are told from looked-up ones."""

    __name__ = "kernel"
    arg_names = ("X", "Y", "n", "SIZE")

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            self.calls.append(("looked up", (*args, *options.values())))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.calls.append(("compiled", args))


def test_a_launch_hands_over_addresses_in_the_kernels_order() -> None:
    kernel, x, y = Kernel(), torch.zeros(3), torch.zeros(3)
    plan = Plan(x.device)
    first, second = plan.given(x), plan.given(y)
    assert first is not None and second is not None
    plan.launch(kernel, (4, 2), (second, first), (3,), {"SIZE": 8}, num_warps=4)
    plan.launch(kernel, (0,), (second, first), (3,), {"SIZE": 8})  # nothing to do
    plan((x, y))
    plan((x, y))
    assert [kind for kind, _ in kernel.calls] == ["looked up", "compiled"]
    assert kernel.calls[1][1] == (y.data_ptr(), x.data_ptr(), 3, 8)


def test_plans_are_forgotten_when_there_are_too_many() -> None:
    plans = Plans()
    for i in range(MOST + 1):
        plans.keep(i, Plan(torch.device("cpu")))
    assert plans.find(0) is None and plans.find(MOST) is not None


def test_the_last_plan_is_found_for_such_tensors_alone() -> None:
    """Each of these has another signature, or is too odd to be asked about; none may be given the plan."""
    plans, plan, x, y = Plans(), Plan(torch.device("cpu")), torch.zeros(4, 8), torch.zeros(6)
    plans.remember("forward", (1.0, False), (x, None, y), plan)
    assert plans.recent("forward", (1.0, False), (torch.ones(4, 8), None, torch.ones(6))) is plan
    aside = torch.zeros(33)[1:].view(4, 8)
    others = [torch.zeros(8, 4), torch.zeros(8, 4).t(), x.double(), torch.zeros(2, 4, 8), aside, torch.nn.Parameter(x), None,
              x.to("meta"), y]
    for other in others:
        assert plans.recent("forward", (1.0, False), (other, None, y)) is None, other
    assert plans.recent("forward", (1.0, False), (x, y, y)) is plans.recent("forward", (1.0, False), (x, y, None)) is None
    assert plans.recent("forward", (2.0, False), (x, None, y)) is plans.recent("backward", (1.0, False), (x, None, y)) is None
    plans.clear()
    assert plans.recent("forward", (1.0, False), (x, None, y)) is None


def test_calls_that_take_turns_stop_replacing_the_last_plan() -> None:
    plans, x, made = Plans(), torch.zeros(4), []
    kinds = [Plan(torch.device("cpu")), Plan(torch.device("cpu"))]
    for i in range(3 * TURNS):
        if plans.recent("forward", i % 2, (x,)) is not kinds[i % 2]:
            made.append(i)
            plans.remember("forward", i % 2, (x,), kinds[i % 2])
    assert made[: TURNS] == list(range(TURNS)) and len(made) < 3 * TURNS  # then every second call is served
    for _ in range(2 * TURNS):
        assert plans.recent("forward", 1 - made[-1] % 2, (x,)) is kinds[1 - made[-1] % 2]
