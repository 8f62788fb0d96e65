"""FSDP2: a sharded model takes the same training step as the whole one.

The test runs this file as a program, once for each rank.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from bertkern.models import BertConfig, BertModel

RANKS = 2


def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config)


def batch():
    """Two sequences for each rank, as many tokens each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 32, (2 * RANKS, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    return ids, mask


def step(bert, ids, mask):
    """Parameters after one step of SGD on a loss that is a mean over sequences."""
    optimizer = torch.optim.SGD(bert.parameters(), lr=0.5)
    output = bert(ids, mask)
    loss = output.last_hidden_state[:, 0].square().mean() + output.pooler_output[:, 0].mean()
    loss.backward()
    optimizer.step()
    return dict(bert.named_parameters())


def rank_main(rank, store):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        whole = step(model(), *batch())
        bert = model()
        before = {name: p.detach().clone() for name, p in bert.named_parameters()}
        mesh = dist.init_device_mesh("cpu", (RANKS,))
        for layer in bert.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(bert, mesh=mesh)
        sharded = step(bert, *(t.chunk(RANKS)[rank] for t in batch()))
        assert any(p.to_local().shape != p.shape for p in sharded.values())
        for name, parameter in sharded.items():
            torch.testing.assert_close(
                parameter.full_tensor(), whole[name], atol=1e-5, rtol=1e-5, msg=name
            )
            assert not torch.equal(whole[name], before[name])
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(
    not dist.is_available() or sys.platform != "linux", reason="needs torch.distributed with gloo"
)
def test_fully_sharded_step_is_the_whole_step(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # gloo's threads abort an interpreter that ends in order, one time in ten
