"""One of two processes with half a batch: `gather_worker.py RANK PORT FILE` saves its loss and gradients."""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

from unclip.clip.train import contrastive_loss

KEYS = [1, 2, 3, 4, 1, 5]


def unit(seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def main(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = slice(3 * rank, 3 * rank + 3)
    z_i, z_t = unit(0)[rows].requires_grad_(), unit(1)[rows].requires_grad_()
    scale = torch.tensor(20.0, requires_grad=True)
    loss = contrastive_loss(z_i, z_t, scale, torch.tensor(KEYS)[rows])
    loss.backward()
    torch.save((loss.detach(), z_i.grad, z_t.grad, scale.grad), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
