"""Fine-tune a folder that transformers wrote, and export one that it loads."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import cli
from foam_lightning.callbacks.memory import MemoryMonitor
from foam_lightning.model.roles import ROLES, role_of
from foam_lightning.plan import MemoryOptions
from tests.support.pretrained import (
    CHAT_TEMPLATE,
    FAMILIES,
    TEXT,
    save_pretrained,
)
from tests.support.runs import NewJob

PROMPT = "def add(self, "
LONG_PROMPT = " ".join(["def add(self, "] * 16)  # longer than the attention windows
NUM_TOKENS = 12


class Run(NamedTuple):
    """A finished run, and the command line that started it."""

    pretrained: Path
    words: list[str]
    folder: Path

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "checkpoints" / "last.ckpt")


def words_for(pretrained: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:30000], encoding="utf-8")
    settings = {
        "model.pretrained": pretrained,
        "model.lr": 0.01,
        "data.files": text,
        "data.sequence_length": 32,
        "data.batch_size": 4,
        "data.validation_sequences": 8,
        "data.cache_dir": tmp_path / "cache",
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 4,
        "trainer.enable_progress_bar": "false",
        "runs": tmp_path / "runs",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    config = tmp_path / "empty.yaml"
    config.write_text("name: tuned\n")
    return ["--config", str(config), "--memory-budget", "20MB", *words]


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    tmp_path = tmp_path_factory.mktemp(request.param)
    pretrained = save_pretrained(tmp_path / "pretrained", request.param)
    words = words_for(pretrained, tmp_path)
    assert cli.main(["fit", *words]) == 0
    return Run(pretrained, words, tmp_path / "runs" / "tuned" / "version_0")


def rows_of(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the validation rows of the run, as its own data module makes them."""
    from tuner.config.parser import parse

    job = parse("fit", run.words, default=None).job()
    data = job.new_data(job.memory_options)
    data.setup()
    batches = list(data.val_dataloader())
    return tuple(torch.cat([b[key] for b in batches]) for key in ("input_ids", "labels"))  # type: ignore[return-value]


def loss_of(folder: Path, ids: torch.Tensor, labels: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def greedy(folder: Path, prompt: str) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(
        **ids, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def test_a_folder_goes_in_and_out(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    hf = run.folder / "hf"
    rows = rows_of(run)
    summary = json.loads((run.folder / "summary.json").read_text())
    found = loss_of(hf, *rows)
    assert found == pytest.approx(summary["final_validation_loss"], abs=1e-5)
    assert found < loss_of(run.pretrained, *rows) - 0.03  # it did train
    for prompt in (PROMPT, LONG_PROMPT):
        capfd.readouterr()
        generate = ["--prompt", prompt, "--max_new_tokens", str(NUM_TOKENS), "--temperature", "0"]
        assert cli.main(["generate", "--ckpt_path", run.checkpoint, *generate]) == 0
        assert capfd.readouterr().out.strip("\n") == greedy(hf, prompt).strip("\n")


def test_the_exported_folder_says_what_it_is(run: Run) -> None:
    before, after = (AutoConfig.from_pretrained(f) for f in (run.pretrained, run.folder / "hf"))
    # A Qwen2 tokenizer has a token to pad with, whatever its folder says.
    unlike = {"dtype", "transformers_version", "_name_or_path", "pad_token_id"}
    assert after.dtype == torch.float32
    assert {k: v for k, v in after.to_dict().items() if k not in unlike} == {
        k: v for k, v in before.to_dict().items() if k not in unlike
    }
    content = json.loads((run.folder / "hf" / "config.json").read_text())
    assert content["torch_dtype"] == "float32"
    rotation = before.rope_parameters.get("full_attention", before.rope_parameters)
    assert content["rope_theta"] == rotation["rope_theta"]
    assert (content["rope_scaling"] or {}).get("rope_type", "default") == rotation["rope_type"]
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in (run.pretrained, run.folder / "hf")]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert tokenizers[0](TEXT[:500])["input_ids"] == tokenizers[1](TEXT[:500])["input_ids"]
    assert (run.folder / "hf" / "generation_config.json").is_file()
    from safetensors import safe_open

    with safe_open(run.folder / "hf" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not before.tie_word_embeddings  # noqa: SIM118


def test_the_plan_folds_every_matrix_of_the_layers(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    assert cli.main(["plan", *run.words, "--format", "json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert plan["feasible"]
    config = AutoConfig.from_pretrained(run.pretrained)
    roles = ["qkv", "o", "gate_up", "down"] if config.model_type == "phi3" else ROLES
    found = sorted(role_of(name) for name in plan["levels"])
    assert found == sorted([*roles] * config.num_hidden_layers)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert 1.0 <= summary["predicted_peak_bytes"] / summary["measured_peak_bytes"] <= 1.01


LEAN = MemoryOptions(
    micro_batch_size=2,
    accumulate_grad_batches=2,
    activation_checkpointing=True,
    selective_checkpointing=True,
    chunked_loss=True,
)


@pytest.mark.parametrize("family", ["qwen3", "phi3", "smollm3", "gemma3"])
@pytest.mark.parametrize("options", [MemoryOptions(micro_batch_size=4), LEAN], ids=["all", "lean"])
def test_the_account_is_exact_for_every_family(
    family: str, options: MemoryOptions, new_job: NewJob, tmp_path: Path
) -> None:
    job = new_job(
        model={"pretrained": str(save_pretrained(tmp_path, family))},
        data={"sequence_length": 64, "batch_size": 4},
        trainer={"max_steps": 2, "precision": "bf16-true"},
    )
    module, memory = job.new_module(), MemoryMonitor()
    plan = module.uniform_plan(2, options)
    module.set_plan(plan)
    trainer = job.new_trainer(options, [memory], bare=True, limit_val_batches=0)
    trainer.fit(module, datamodule=job.new_data(options))
    assert memory.measured_bytes is not None
    predicted = job.new_accountant().account(plan).peak_bytes
    assert 1.0 <= predicted / memory.measured_bytes <= 1.01
    buffers = module.model.model.rotary_emb.buffers()  # type: ignore[union-attr]
    assert {buffer.dtype for buffer in buffers} == {torch.float32}


def contents(folder: Path) -> dict[str, bytes]:
    # The settings of a tokenizer say how it was loaded.
    names = {path.name for path in folder.iterdir()} - {"tokenizer_config.json"}
    return {name: (folder / name).read_bytes() for name in names}


def test_nothing_needs_the_folder_any_more(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run.folder / "summary.json").read_text())
    away = run.pretrained.with_name("away")
    expected = contents(run.folder / "hf")
    run.pretrained.rename(away)
    try:
        capfd.readouterr()
        assert cli.main(["validate", "--ckpt_path", run.checkpoint]) == 0
        assert f"{summary['final_validation_loss']:.4f}" in capfd.readouterr().out
        exported = run.folder.parent / "exported"
        words = ["export", "--ckpt_path", run.checkpoint, "--output", str(exported)]
        assert cli.main(words) == 0
        assert contents(exported) == expected
        shutil.rmtree(exported)
        (run.folder / "summary.json").unlink()  # as if it had been killed at the end
        shutil.rmtree(run.folder / "hf")
        assert cli.main(["fit", *run.words]) == 0
        assert contents(run.folder / "hf") == expected
        again = json.loads((run.folder / "summary.json").read_text())
        assert again["final_validation_loss"] == summary["final_validation_loss"]
    finally:
        away.rename(run.pretrained)


def chat_words_for(pretrained: Path, tmp_path: Path) -> list[str]:
    pairs = [{"prompt": f"{i} + {i}?", "response": "I add."} for i in range(60)]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    words = words_for(pretrained, tmp_path)
    return [*words, "--data.files", str(chat), "--data.chat", "true"]


def test_responses_alone_are_learned(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pretrained = save_pretrained(tmp_path / "pretrained", "qwen2", template=None)
    words = chat_words_for(pretrained, tmp_path)
    assert cli.main(["fit", *words]) == 0
    folder = tmp_path / "runs" / "tuned" / "version_0"
    run = Run(pretrained, words, folder)
    ids, labels = rows_of(run)
    assert 0 < int((labels != -100).sum()) < int((ids != ids[0, -1]).sum()) / 2
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation_tokens"] == int((labels[:, 1:] != -100).sum())
    found = loss_of(folder / "hf", ids, labels)
    assert found == pytest.approx(summary["final_validation_loss"], abs=1e-5)
    exported = AutoTokenizer.from_pretrained(folder / "hf")
    prompt = exported.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<s>### User\nHi\n\n### Assistant\n"


def answered(folder: Path, text: str) -> str:
    """Return the answer of plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt"
    )
    end = tokenizer.eos_token_id
    written = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=end)
    answer = written[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None], ids=["its template", "the plain one"])
def test_a_prompt_is_what_the_user_says_and_the_answer_ends_with_the_turn(
    template: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pretrained = save_pretrained(tmp_path / "pretrained", "llama-2", template=template)
    words = [*chat_words_for(pretrained, tmp_path), "--trainer.max_steps", "60"]
    assert cli.main(["fit", *words, "--data.sequence_length", "48"]) == 0
    checkpoint = str(tmp_path / "runs" / "tuned" / "version_0" / "checkpoints" / "last.ckpt")
    generate = ["generate", "--ckpt_path", checkpoint, "--temperature", "0"]
    capfd.readouterr()
    assert cli.main([*generate, "--prompt", "7 + 7?"]) == 0
    assert capfd.readouterr().out.strip("\n") == "I add."
    exported = tmp_path / "exported"
    assert cli.main(["export", "--ckpt_path", checkpoint, "--output", str(exported)]) == 0
    for folder in (exported, tmp_path / "runs" / "tuned" / "version_0" / "hf"):
        assert answered(folder, "7 + 7?") == "I add."
    capfd.readouterr()
    assert cli.main([*generate, "--prompt", "7 + 7?", "--data.chat", "false"]) == 0
    assert capfd.readouterr().out.startswith("7 + 7?")
    assert cli.main(generate) == 2
    assert "--prompt" in capfd.readouterr().err


def test_a_tokenizer_without_a_template_knows_no_conversation(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(run.checkpoint, weights_only=True)
    del content["TextData"]["tokenizer"]["chat_template.jinja"]
    checkpoint = run.folder.parent / "without.ckpt"
    torch.save(content, checkpoint)
    capfd.readouterr()
    words = ["--prompt", "Hi", "--data.chat", "true"]
    assert cli.main(["generate", "--ckpt_path", str(checkpoint), *words]) == 2
    assert "has no chat template; set --data.chat false" in capfd.readouterr().err
