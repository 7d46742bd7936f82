"""What the decoder's loss draws and adds, by itself: steps, its own predictions, edges."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoder.train import draw_timesteps, edge_error, own_predictions
from unclip.core.data import Draws
from unclip.core.diffusion import Diffusion, make_scheduler


def test_a_share_of_the_samples_is_noisy():
    draws = [Draws(0, step, range(100)) for step in range(100)]

    def steps(share: float, start: int = 700) -> Tensor:
        return torch.cat([draw_timesteps(d, 1000, share, start) for d in draws])

    alike = [Draws(0, step, range(100)).integers(1000) for step in range(100)]
    assert torch.equal(steps(0.0), torch.cat(alike))
    assert steps(1.0).min() == 700
    assert steps(1.0).max() == 999
    expected = 0.3 * 0.4 + 0.6  # of all t alike, and of the share
    assert abs((steps(0.6) >= 700).float().mean() - expected) < 0.02  # four standard errors


def test_own_predictions_stand_in_for_a_share_and_carry_no_gradient():
    """A decoder that answers with its z_i: rows that are chosen become that, from a step no less noisy than t."""
    seen: list[Tensor] = []

    class Answers(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, z_i: Tensor) -> Tensor:
            seen.append(t)
            return z_i[:, :, None, None].expand_as(x_t) * weight

    weight = torch.ones((), requires_grad=True)
    diffusion = Diffusion.from_scheduler(make_scheduler("cosine", "sample"))
    x0, t, z_i = torch.rand(400, 3, 2, 2), torch.arange(400) * 2 + 100, torch.arange(1200).view(400, 3) / -1200
    shown = own_predictions(Answers(), diffusion, x0, t, {"z_i": z_i}, Draws(0, 0, range(400)), 0.25)
    own = (shown == z_i[:, :, None, None]).flatten(1).all(1)
    assert 60 < own.sum() < 140 and torch.equal(shown[~own], x0[~own]) and not shown.requires_grad
    assert (seen[0] >= t[own]).all() and seen[0].max() <= 999 and (seen[0] > t[own]).float().mean() > 0.9
    assert own_predictions(Answers(), diffusion, x0, t, {"z_i": z_i}, Draws(0, 0, range(400)), 0.0) is x0
    assert len(seen) == 2  # where no row is chosen the network runs too: of several processes all have to


def test_edges_are_of_neighbours_alone_and_their_median_is_what_counts():
    x0 = torch.rand(2, 3, 5, 7)
    assert edge_error(x0 + 0.3, x0) < 1e-6  # one shade all over has no edge
    dot = F.pad(torch.full((1, 1, 1, 1), 0.5), (3, 3, 2, 2))  # it has two edges in each direction
    assert torch.allclose(edge_error(x0 + dot, x0), torch.tensor(0.5 * 2 / (5 * 6) + 0.5 * 2 / (4 * 7)))
    targets = torch.zeros(4, 3, 1, 2)
    targets[0, ..., 1] = 1  # three fills of four are plain: the least squared error is a step of a quarter
    step = torch.tensor(0.25, requires_grad=True)
    x = (step * torch.tensor([0.0, 1.0])).expand(4, 3, 1, 2)
    assert torch.autograd.grad(F.mse_loss(x, targets), step, retain_graph=True)[0].abs() < 1e-6
    assert torch.autograd.grad(edge_error(x, targets), step)[0] > 0.1  # and here it is to be plain
