"""One rank of a site that trains small Llamas and Qwens under FSDP2, in a loop of its own, one after another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fl_adapters.torch import FederatedLoop

BATCH, ROWS, RATE = 8, 24, 0.05
SHAPE = {
    "vocab_size": 33,  # not a multiple of the ranks
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


def model_of(kind: str, *, lora: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = (
        LlamaForCausalLM(LlamaConfig(**SHAPE))
        if kind == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True))
    )
    if lora:
        import peft

        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        net = peft.get_peft_model(net, config)  # type: ignore[arg-type]
    return net


def sharded(net: Any, *, copies: int = 1) -> nn.Module:
    """Shard a model over both ranks, or with `copies=2` (HSDP) give each rank all of it."""
    mesh = init_device_mesh("cpu", (copies, 2 // copies), mesh_dim_names=("copies", "shards")) if copies > 1 else None
    base = net.get_base_model() if hasattr(net, "get_base_model") else net
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net  # type: ignore[no-any-return]


def rows(seed: int, count: int = ROWS) -> TensorDataset:
    return TensorDataset(torch.randint(0, 33, (count, 8), generator=torch.Generator().manual_seed(seed)))


def train(kit: str | None, ranks: int = 1, rank: int = 0, *, site: int = 0, settings: Any) -> tuple[Any, Any]:
    """Train with the same batches whatever the number of ranks; return the network and the loop."""
    net = model_of(settings["model"], lora=settings.get("lora", False))
    net = sharded(net, copies=settings.get("copies", 1)) if ranks > 1 else net
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE) if settings.get("sgd") else torch.optim.AdamW(trained, RATE / 10)
    sampler = DistributedSampler(rows(site), ranks, rank, shuffle=False)  # together the ranks' batches are those of one
    data = DataLoader(rows(site), batch_size=BATCH // ranks, sampler=sampler)

    def evaluate() -> tuple[dict[str, float], int]:
        (tokens,) = rows(99, 8).tensors
        return {"loss": net(input_ids=tokens, labels=tokens).loss.item()}, len(tokens)

    with torch.no_grad():
        evaluate()  # leaves full parameters in the root module
    loop = FederatedLoop(net, optimizer, evaluate=evaluate, kit=kit)
    for round in loop.rounds(data):
        for (tokens,) in round:
            optimizer.zero_grad()
            loss = net(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            round.add_loss(loss.detach())
        evaluate()
    return net, loop


def take_part(rank: int, port: int, folder: Path, runs: list[tuple[str, str, Any]]) -> None:
    """Train all runs as one of two ranks, in a process for this alone. Each run leaves a file in `folder`.

    Args:
        rank: The rank.
        port: Port of the ranks' own rendezvous.
        folder: Folder for results and output.
        runs: (name, kit, settings) of each run.
    """
    with open(folder / f"output-{rank}.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, kit, settings in runs:
        net, loop = train(kit, 2, rank, site=settings["site"], settings=settings)
        full = {name: p.full_tensor().detach() for name, p in net.named_parameters()}
        held = sum(p.to_local().numel() for p in net.parameters())
        torch.save({"weights": full, "held": held, "stats": dict(loop.exchange_stats)}, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()
