"""What the demo does: the same questions, with the prompt's KV in one place after another.

Run as a module it is the demo's new process: a job on stdin, its runs on stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.errors import KVStoreError

if TYPE_CHECKING:
    from kvstore.engine.engine import Engine
    from kvstore.engine.loading import LoadedModel
    from kvstore.engine.output import Output
    from kvstore.store import BlockStore

QUESTIONS = (
    "What is the first promise of kvstore?",
    "What is a lease?",
    "What is the default size of the RAM tier?",
)
MAX_TOKENS = 24

# Small on purpose. The handbook's KV is about 75 MB.
HBM_BYTES, RAM_BYTES, NVME_BYTES = "96 MiB", "128 MiB", "256 MiB"
# Every CPU is quick at it, also one that has no bfloat16 arithmetic.
DTYPE = "float32"

COLD, HBM, RAM, NVME = "cold", "hbm", "ram", "nvme"
PLACES = {
    COLD: "cold",
    HBM: "HBM",
    RAM: "RAM, HBM cleared",
    NVME: "NVMe, new process",
}


@dataclass(frozen=True)
class Run:
    """One question, asked once."""

    question: str
    place: str
    text: str
    finish_reason: str
    token_ids: list[int]
    ttft_s: float
    prompt_tokens: int
    hbm: int
    ram: int
    nvme: int
    recomputed: int

    @property
    def adds_up(self) -> bool:
        return self.hbm + self.ram + self.nvme + self.recomputed == self.prompt_tokens

    @classmethod
    def of(cls, question: str, place: str, output: Output) -> Run:
        usage = output.usage
        return cls(
            question,
            place,
            output.text.strip(),
            output.finish_reason,
            list(output.token_ids),
            usage.ttft_s,
            usage.prompt_tokens,
            usage.hbm_tokens,
            usage.ram_tokens,
            usage.nvme_tokens,
            usage.recomputed_tokens,
        )


def document() -> str:
    """The handbook, which is part of the package."""
    return (files("kvstore.cli") / "handbook.md").read_text(encoding="utf-8")


def run_all(model_file: Path, directory: Path, began: Callable[[str, str], object]) -> list[Run]:
    """Every question from every place; `began(place, question)` is called before each.

    Raises InputError when the model cannot be used, KVStoreError when the new
    process fails.
    """
    runs: list[Run] = []
    model = load_model(model_file)
    with opened(model, directory) as (store, engine):
        for question in QUESTIONS:
            began(COLD, question)
            forget(store, engine, prompt(model, question))
            runs.append(ask(engine, question, COLD))
        for place in (HBM, RAM):
            for question in QUESTIONS:
                began(place, question)
                if place == RAM:
                    engine.clear_hbm()
                runs.append(ask(engine, question, place))
    began(NVME, QUESTIONS[0])
    return runs + _in_new_process(model_file, directory)


def load_model(path: Path) -> LoadedModel:
    """The model alone, for several engines one after the other."""
    from kvstore.cli.console import progress
    from kvstore.cli.running import engine_extra

    with engine_extra():
        from kvstore.engine.engine import Engine
    with (
        progress(f"Loading {path.name}") as report,
        Engine.from_pretrained(path, dtype=DTYPE, hbm_bytes=HBM_BYTES, progress=report) as engine,
    ):
        return engine.model


@contextmanager
def opened(model: LoadedModel, directory: Path) -> Iterator[tuple[BlockStore, Engine]]:
    """A store with cold RAM over `directory`, and an engine with cold HBM."""
    from kvstore import compose
    from kvstore.engine.engine import Engine

    with (
        compose.open(ram_bytes=RAM_BYTES, nvme_path=directory, nvme_bytes=NVME_BYTES) as store,
        Engine(model, store=store, hbm_bytes=HBM_BYTES) as engine,
    ):
        yield store, engine


def prompt(model: LoadedModel, question: str) -> list[int]:
    """Tokens of the handbook and the question, as one message of a user."""
    from kvstore.engine.prompts import prompt_tokens

    return prompt_tokens(model, [{"role": "user", "content": f"{document()}\n\n{question}"}])


def forget(store: BlockStore, engine: Engine, tokens: list[int]) -> None:
    """Nothing of this prompt is in any tier afterwards."""
    from kvstore.hashing import TokenChain

    engine.clear_hbm()
    store.evict(TokenChain(engine.namespace, tokens).chain())


def ask(engine: Engine, question: str, place: str) -> Run:
    from kvstore.engine.sampling import SamplingParams

    params = SamplingParams(max_tokens=MAX_TOKENS, stop=("\n",))
    (output,) = engine.generate([prompt(engine.model, question)], params)
    return Run.of(question, place, output)


def _in_new_process(model_file: Path, directory: Path) -> list[Run]:
    done = subprocess.run(
        [sys.executable, "-m", "kvstore.cli.demo_runs"],
        input=json.dumps([str(model_file), str(directory)]),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        process_group=0,  # Ctrl-C is for us; what becomes of the child is in `run`'s hands
    )
    if done.returncode:
        raise KVStoreError(f"the demo's new process ended with status {done.returncode}")
    return [Run(**fields) for fields in json.loads(done.stdout)]


def _new_process() -> None:
    """RAM is cold for each question, for the store is opened anew."""
    model_file, directory = json.load(sys.stdin)
    model = load_model(Path(model_file))
    runs: list[dict[str, Any]] = []
    for question in QUESTIONS:
        with opened(model, Path(directory)) as (_, engine):
            runs.append(asdict(ask(engine, question, NVME)))
    json.dump(runs, sys.stdout)


if __name__ == "__main__":
    _new_process()
