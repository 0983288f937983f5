"""fp16 needs its loss scaled, bf16 needs masters in fp32: shown where it would go wrong."""

from collections.abc import Callable
from itertools import islice

import pytest
import torch
from tests.train.tiny_run import Tiny, stream
from torch import Tensor, nn
from torch.nn import functional as F

from recast.adapter.layers import LoCon, Switch
from recast.lowrank import LowRank
from recast.objective import FLOW
from recast.train import Draw, Seen, criterion, from_data, train

torch.set_num_threads(1)
LOSS = criterion(from_data(FLOW), FLOW)


class Half(nn.Module):
    """One convolution with fp32 masters, computed in fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(Tiny().one.weight.detach()[:4])

    def student(self, draw: Draw) -> Tensor:
        clock = draw.t.view(-1, 1, 1, 1).expand(-1, 1, *draw.x.shape[2:])
        seen = torch.cat([draw.x, clock], 1).half()
        return F.conv2d(seen, self.weight.half(), padding=1).float()


def scaled(by: float) -> Callable:
    def loss(net: object, draw: Draw) -> Seen:
        seen = LOSS(net, draw)
        return Seen(seen.distance, seen.weighted * by)

    return loss


def test_small_gradients_survive_in_fp16_where_the_loss_is_scaled() -> None:
    norms = []
    for scaler in (None, torch.amp.GradScaler("cpu")):
        net = Half()
        run = train(
            net.student, stream(), scaled(1e-8), torch.optim.SGD(net.parameters(), 1e-3),
            scaler=scaler, clip=None,
        )  # fmt: skip
        norms.append(next(run).grad_norm)
    net = Half().float()
    scaled(1.0)(net.student, next(stream())).weighted.mean().backward()
    wanted = 1e-8 * net.weight.grad.norm().item()
    assert norms[0] < 0.1 * wanted
    assert norms[1] == pytest.approx(wanted, rel=0.02)


def test_an_overflow_halves_the_scale_and_is_no_bad_step() -> None:
    net = Half()
    before = net.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    steps = list(islice(train(net.student, stream(), LOSS, optimizer, scaler=scaler), 16))
    taken = [s for s in steps if s.grad_norm < float("inf")]
    lost = [s for s in steps if s not in taken]
    assert len(lost) > 3  # more than the bad steps that end a run
    assert [s.scale for s in lost] == [2.0 ** (24 - k) for k in range(len(lost))]
    assert all(s.skipped == 0 for s in steps)
    assert len(taken) > 3
    assert not torch.equal(net.weight, before)


class Network(nn.Module):
    """Two linear layers with principal factors of rank 4 round frozen weights."""

    def __init__(self, trunk: torch.dtype, masters: torch.dtype) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(2)
        layers, switch = [], Switch()
        for rows, columns in ((24, 5), (4, 24)):
            weight = torch.randn(rows, columns, generator=gen) * 0.3
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            start = LowRank((u * s)[:, :4], v[:4])
            base = nn.Linear(columns, rows, bias=False)
            base.weight = nn.Parameter(weight.to(trunk), requires_grad=False)
            layers.append(LoCon(base, start, start, switch))
        self.one, self.two = layers
        for p in self.masters():
            p.data = p.data.to(masters)
        self.trunk = trunk
        self.start = [p.detach().float().clone() for p in self.masters()]

    def masters(self) -> list[nn.Parameter]:
        return [self.one.up, self.one.down, self.two.up, self.two.down]

    def student(self, draw: Draw) -> Tensor:
        clock = draw.t.view(-1, 1, 1, 1).expand(-1, 1, *draw.x.shape[2:])
        seen = torch.cat([draw.x, clock], 1).movedim(1, -1).to(self.trunk)
        return self.two(torch.tanh(self.one(seen))).movedim(-1, 1).float()

    def moved(self) -> Tensor:
        now = [p.detach().float() for p in self.masters()]
        return torch.cat([(a - b).flatten() for a, b in zip(now, self.start, strict=True)])


def test_masters_in_fp32_follow_the_fp32_run_and_bf16_ones_do_not() -> None:
    """60 steps of 1e-5, which are below half a bf16 spacing of most factors."""
    runs = {}
    for name, trunk, masters in (
        ("fp32", torch.float32, torch.float32),
        ("masters", torch.bfloat16, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
    ):
        net = Network(trunk, masters)
        optimizer = torch.optim.AdamW(net.masters(), 1e-5, weight_decay=0.0)
        for _ in islice(train(net.student, stream(), LOSS, optimizer), 60):
            pass
        runs[name] = net.moved()
    size = runs["fp32"].norm()
    assert (runs["masters"] - runs["fp32"]).norm() / size < 0.02
    assert (runs["bf16"] - runs["fp32"]).norm() / size > 0.9
