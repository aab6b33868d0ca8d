"""Several ranks at one site, over gloo on the CPU: rank 0 alone talks, all hold the same weights, none deadlocks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import hf_models as m
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from fl_adapters.torch.state import TorchState

RANK = """
import os
os.environ.update(VALUES["ranks"], RANK=str(VALUES["rank"]), LOCAL_RANK=str(VALUES["rank"]))
"""

DDP = """
import torch
import torch.distributed as dist
import hf_models as m
from fl_adapters.hf import FederatedCallback

torch.set_num_threads(1)
arguments = m.arguments(ddp_backend="gloo", per_device_train_batch_size=4, **VALUES["arguments"])
model = m.adapted(m.classifier()) if VALUES["lora"] else m.classifier()
trainer = m.Trainer(
    model=model, args=arguments, train_dataset=m.Tokens(32), eval_dataset=m.Tokens(16, seed=5),
    callbacks=[FederatedCallback(optimizer_state=VALUES["policy"])],
)
assert dist.get_world_size() == 2
try:
    trainer.train()
finally:
    steps = trainer.state.global_step
RESULT = steps, [r for r in trainer.state.log_history if "federation_round" in r], {
    n: p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad
}
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def two_ranks(run, program: str, **values):
    """Run the program as the two ranks of site 1."""
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    given = {"policy": "keep", "lora": True, "arguments": {}, "ranks": ranks, **values}
    return [run.fork(RANK + program, {**given, "rank": rank}) for rank in (0, 1)]


def halved(_round: int, arrays):
    return {name: array / 2 for name, array in arrays.items()}


@pytest.mark.parametrize("policy", ["keep", "reset", "average"])
def test_every_rank_has_the_global_weights(federation, policy) -> None:
    run = federation(sites=2, rounds=2, optimizer_state=policy)
    model = m.adapted(m.classifier())
    if policy == "average":  # the partner has no optimizer whose moments it could send
        sites = [two_ranks(run, DDP, policy=policy), [run.fork(ONE_RANK, {"policy": policy}, number=2)]]
        results = [rank.result() for rank in sites[0]]
        expected = sites[1][0].result()
    else:
        partner = run.partner(model, halved)
        results = [rank.result() for rank in two_ranks(run, DDP, policy=policy)]
        partner.ended()
        expected = partner.received[-1]
    assert len(run.ended().rounds) == 2
    for steps, rows, weights in results:
        assert steps == 8 and [row["federation_round"] for row in rows] == [1, 2]
        assert all(
            np.array_equal(weights[n.replace(".weight", ".default.weight")], expected[n]) for n in lora(expected)
        )
    assert [e.data["num_examples"] for e in run.events_of("update", "site-1")] == [32, 32]  # over all ranks
    assert len(run.events_of("joined", "site-1")) == 1


def lora(arrays) -> list[str]:
    return [name for name in arrays if "lora" in name]


ONE_RANK = """
import hf_models as m
from fl_adapters.hf import FederatedCallback
from fl_adapters.torch.state import TorchState

model = m.adapted(m.classifier())
m.trainer(FederatedCallback(optimizer_state=VALUES["policy"]), model=model).train()
RESULT = TorchState(model).get_state()
"""


def test_full_fine_tuning_on_two_ranks(federation) -> None:
    run = federation(sites=2, rounds=1)
    partner = run.partner(m.classifier(), halved)
    results = [rank.result() for rank in two_ranks(run, DDP, lora=False)]
    partner.ended()
    for _, _, weights in results:
        assert all(np.array_equal(weights[n], partner.received[-1][n]) for n in weights)


WITH_VALIDATION = ONE_RANK.replace(
    "model=model", "model=model, train_dataset=m.Tokens(32, seed=9), eval_dataset=m.Tokens(16, seed=6)"
)


def test_every_rank_scores_the_models_of_other_sites(federation) -> None:
    run = federation(sites=2, rounds=2, cross_site=True)
    # without it transformers 5 multiplies the loss of a classifier by the number of ranks, also in its own evaluation
    plain_loss = {"average_tokens_across_devices": False}
    ranks, other = two_ranks(run, DDP, arguments=plain_loss), run.fork(WITH_VALIDATION, {"policy": "keep"}, number=2)
    results, final = [rank.result() for rank in ranks], other.result()
    for _, _, weights in results:
        assert all(np.array_equal(weights[n.replace(".weight", ".default.weight")], final[n]) for n in lora(final))
    model = m.adapted(m.classifier())
    TorchState(model).set_state(run.model())
    by_hand = [m.trainer(None, model=model, eval_dataset=m.Tokens(16, seed=s)).evaluate()["eval_loss"] for s in (5, 6)]
    (event,) = run.events_of("cross_site")
    matrix = event.data["matrix"]
    assert sorted(matrix) == ["global", "site-1", "site-2"]
    assert all(sorted(row) == ["site-1", "site-2"] for row in matrix.values())
    found = [matrix["global"][site]["loss"] for site in ("site-1", "site-2")]
    assert found == pytest.approx(by_hand, abs=1e-6)
    assert all(matrix["site-1"][site]["loss"] != matrix["site-2"][site]["loss"] for site in ("site-1", "site-2"))


def test_failure_of_the_run_reaches_every_rank(federation) -> None:
    run = federation(sites=2, rounds=3)

    def fail(round: int, arrays):
        raise RuntimeError("the other site broke")

    run.partner(m.adapted(m.classifier()), fail)
    errors = [rank.error() for rank in two_ranks(run, DDP)]
    assert "site-2" in errors[0] and errors[1] == errors[0]


def test_configuration_error_reaches_every_rank(federation) -> None:
    run = federation(rounds=3)
    program = DDP.replace('callbacks=[FederatedCallback(optimizer_state=VALUES["policy"])],', "").replace(
        "try:", "trainer.add_callback(FederatedCallback())\ntry:"
    )
    for rank in two_ranks(run, program):
        assert "num_train_epochs=3" in rank.error()


@pytest.mark.slow
def test_torchrun_outlives_a_round_of_three_process_group_timeouts(federation, tmp_path) -> None:
    """The other site takes 30 s for a round; this site's process group gives up after 10 s of silence."""
    run = federation(sites=2, rounds=2)

    def slowly(round: int, arrays):
        if round == 1:
            time.sleep(30)  # the thing itself, not a wait for a condition
        return halved(round, arrays)

    partner = run.partner(m.adapted(m.classifier()), slowly)
    script = tmp_path / "train.py"
    script.write_text(
        'VALUES = {"policy": "keep", "lora": True, "arguments": {"ddp_timeout": 10}}\n' + DDP
        + "import numpy, os\nnumpy.savez(os.environ['RANK'], **RESULT[2])\n"
    )  # fmt: skip
    environment = {
        **os.environ,
        "FL_ADAPTERS_KIT": run.kit(),
        "PYTHONPATH": os.pathsep.join([str(Path(m.__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = subprocess.run([*command, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    partner.ended()
    assert run.ended().rounds[0].seconds > 30
    for rank in (0, 1):
        weights = np.load(tmp_path / f"{rank}.npz")
        for name in lora(partner.received[-1]):
            key = name.replace(".weight", ".default.weight")
            assert np.array_equal(weights[key], partner.received[-1][name])


FSDP = """
import torch
import torch.distributed as dist
import hf_models as m
from transformers import AutoModelForCausalLM
from fl_adapters.hf import FederatedCallback

torch.set_num_threads(1)
arguments = m.arguments(ddp_backend="gloo", per_device_train_batch_size=4)
arguments.device  # begins the process group
options = {}
if VALUES["by"] == "transformers":
    from transformers.distributed import DistributedConfig

    options["distributed_config"] = DistributedConfig(fsdp_size=2)
model = AutoModelForCausalLM.from_pretrained(VALUES["base"], **options)
model = m.adapted(model) if VALUES["lora"] else model
trainer = m.Trainer(
    model=model, args=arguments, train_dataset=m.Sentences(32), eval_dataset=m.Sentences(16, seed=5),
    callbacks=[FederatedCallback()],
)
if VALUES["by"] == "accelerate":
    m.shard_by_accelerate(trainer)
trainer.train()
sharded = [n for n, p in model.named_parameters() if hasattr(p, "full_tensor")]
RESULT = len(sharded), {
    n.replace(".default", ""): (p.full_tensor() if n in sharded else p).detach().numpy()
    for n, p in model.named_parameters() if p.requires_grad
}
"""


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_sites_sharded_by_fsdp2_train_the_model_of_ddp(federation, tmp_path, lora) -> None:
    import peft

    m.decoder().save_pretrained(tmp_path / "base")
    models = {}
    for by in ("ddp", "transformers", "accelerate"):
        if by == "transformers" and int(transformers.__version__.split(".")[0]) < 5:
            continue  # transformers 4 has no FSDP2 of its own
        run = federation(sites=2, rounds=2)
        # the partner does not shard: sites may differ in this
        partner = run.partner(m.adapted(m.decoder()) if lora else m.decoder(), halved)
        results = [rank.result() for rank in two_ranks(run, FSDP, base=str(tmp_path / "base"), lora=lora, by=by)]
        partner.ended()
        assert len(run.ended().rounds) == 2
        models[by] = partner.received[-1]
        for sharded, weights in results:
            assert (sharded > 0) == (by != "ddp")
            assert all(np.array_equal(weights[name], value) for name, value in models[by].items())
        if lora:  # nothing of the base
            assert len(load_file(run.folder / "model" / "adapter_model.safetensors")) == len(models[by])
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base" if lora else run.folder / "model")
        opened = peft.PeftModel.from_pretrained(opened, run.folder / "model") if lora else opened
        for name, parameter in opened.named_parameters():
            if (value := models[by].get(name.replace(".default", ""))) is not None:
                assert np.array_equal(parameter.detach().numpy(), value), name
    for by, model in models.items():
        for name, value in models["ddp"].items():
            assert np.abs(model[name] - value).max() < 1e-6, (by, name)
