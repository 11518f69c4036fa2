"""What verl 0.9.1's trainer does to a run's files, in its order, without a model or verl.

`install` writes it as a package `verl` that `python -m verl.trainer.main_ppo` runs. At the moment
that STAND_IN_STOPS names it writes the file `stopped` and waits to be killed.
"""

from __future__ import annotations

from pathlib import Path

PROGRAM = """
import json, os, shutil, sys, time
from pathlib import Path

given = dict(word.lstrip("+").split("=", 1) for word in sys.argv[1:])
text = lambda name: given[name].strip("'")
checkpoints = Path(text("trainer.default_local_dir"))
root = checkpoints.parent
steps, save, test = (
    int(text(f"trainer.{name}")) for name in ("total_training_steps", "save_freq", "test_freq")
)
keep = int(text("trainer.max_actor_ckpt_to_keep"))
named = checkpoints / "latest_checkpointed_iteration.txt"
saved = []

def reach(moment):
    if os.environ.get("STAND_IN_STOPS") == moment:
        (root / "stopped").write_text(str(os.getpid()))
        time.sleep(600)

def sample(weights):
    (root / "steps" / f"step-{weights}-host-{os.getpid()}").mkdir(parents=True, exist_ok=True)

def remove(folders):
    for folder in folders:
        shutil.rmtree(folder / "actor")
        reach(f"removed after {now}")

def checkpoint():
    global saved
    if keep > 1 and len(saved) >= keep:
        remove(saved[: len(saved) - keep + 1])
        saved = saved[len(saved) - keep + 1 :]
    folder = checkpoints / f"global_step_{now}"
    (folder / "actor").mkdir(parents=True, exist_ok=True)
    for part in ("model", "optim", "extra_state"):
        (folder / "actor" / f"{part}_world_size_1_rank_0.pt").write_text(part)
        reach(f"{part} saved {now}")
    saved.append(folder)
    if len(saved) > keep:
        remove(saved[: len(saved) - keep])
        saved = saved[len(saved) - keep :]
    (folder / "data.pt").write_text("data")
    with named.open("w") as file:
        reach(f"naming {now}")
        file.write(str(now))

now = 0
if named.exists() and (folder := checkpoints / f"global_step_{int(named.read_text())}").exists():
    now = int(named.read_text())
    for part in ("model", "optim", "extra_state"):
        (folder / "actor" / f"{part}_world_size_1_rank_0.pt").read_text()

log = open(os.environ["VERL_FILE_LOGGER_PATH"], "w", buffering=1)
tell = lambda **data: log.write(json.dumps({"step": now, "data": data}) + "\\n")
validation = {"val-core/gsm8k-held-out/acc/mean@1": 0.5}
sample(now)
reach(f"first validation {now}")
tell(**validation)
while now < steps:
    now += 1
    sample(now - 1)
    reach(f"sampling {now}")
    if now % save == 0 or now == steps:
        checkpoint()
    data = {"timing_s/step": 1.0, "critic/score/mean": now / 100}
    if now % test == 0 or now == steps:
        sample(now)
        reach(f"validating {now}")
        data.update(validation)
    line = json.dumps({"step": now, "data": data})
    log.write(line[:9])
    log.flush()
    reach(f"telling {now}")
    log.write(line[9:] + "\\n")
"""


def install(folder: Path) -> Path:
    """Writes the package into `folder`, which is to stand on PYTHONPATH."""
    trainer = folder / "verl" / "trainer"
    trainer.mkdir(parents=True)
    for package in (trainer.parent, trainer):
        (package / "__init__.py").write_text("")
    (trainer / "main_ppo.py").write_text(PROGRAM)
    metadata = folder / "verl-0.9.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.9.1\n")
    return folder
