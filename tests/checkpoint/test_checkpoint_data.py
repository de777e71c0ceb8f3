"""A checkpoint decides the tokenizer, the chat template and the data, also far from its run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import cli
from foam_lightning.data.saved import load_saved_tokenizer, peek_checkpoint, saved_settings
from foam_lightning.errors import CheckpointError
from foam_lightning.module import LlamaFoam
from tests.support.pretrained import CHAT_TEMPLATE, save_pretrained, save_tokenizer
from tests.support.tiny import write_settings
from tuner.config.parser import parse


class Run:
    """A finished run, its folder, and a copy of its checkpoint far from it."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.at = folder
        self.words = ["--config", str(write_settings(folder)), "--trainer.max_steps", "4", *words]
        assert cli.main(["fit", *self.words]) == 0
        self.longer = [*self.words, "--trainer.max_steps", "6"]
        self.folder = folder / "runs" / "default" / "version_0"
        self.checkpoint = self.folder / "checkpoints" / "last.ckpt"
        (folder / "far").mkdir()
        self.lone = Path(shutil.copy(self.checkpoint, folder / "far" / "lone.ckpt"))
        self.old = folder / "far" / "old.ckpt"
        content = torch.load(self.lone, weights_only=True)
        del content["TextData"]  # as an older version wrote it
        torch.save(content, self.old)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("chat")
    pretrained = save_pretrained(folder / "pretrained", "llama-2", template=CHAT_TEMPLATE)
    pairs = [{"prompt": f"{i} + {i}?", "response": "I add."} for i in range(60)]
    (folder / "chat.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    words = ["--data.files", str(folder / "chat.jsonl"), "--data.chat", "true"]
    run = Run(folder, "--model.pretrained", str(pretrained), *words)
    shutil.rmtree(pretrained)
    return run


Printed = pytest.CaptureFixture[str]


def answer(printed: Printed, *words: object) -> str:
    """Return what a command prints."""
    printed.readouterr()
    assert cli.main([str(word) for word in words]) == 0
    return printed.readouterr().out


def refused(printed: Printed, *words: object) -> str:
    """Return the error of a command."""
    printed.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    return printed.readouterr().err


def tokenizer_of(folder: Path) -> str:
    return (folder / "tokenizer" / "tokenizer.json").read_text()


def test_going_on_with_other_text_keeps_the_tokenizer(run: Run, capfd: Printed) -> None:
    other = run.at / "other.jsonl"
    lines = (json.dumps({"text": f"wholly other words {i}, {i}, {i} " * 9}) for i in range(200))
    other.write_text("\n".join(lines))
    words = [*run.longer, "--name", "other", "--data.files", other]
    printed = answer(capfd, "fit", *words, "--ckpt_path", run.lone)
    assert "was trained on" in printed
    assert "going on with" in printed
    folder = run.at / "runs" / "other" / "version_0"
    assert tokenizer_of(folder) == tokenizer_of(run.folder)
    assert AutoTokenizer.from_pretrained(folder / "hf").get_vocab() == (
        load_saved_tokenizer(folder / "checkpoints" / "last.ckpt").get_vocab()
    )
    settings = saved_settings(peek_checkpoint(folder / "checkpoints" / "last.ckpt") or {})
    assert settings["files"] == [str(other)]


@pytest.mark.parametrize("before", ["false", "true"])
@pytest.mark.parametrize("after", ["false", "true"])
def test_other_text_is_read_from_its_beginning(
    before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A position in one text, packed or streamed, means nothing in another."""
    texts = [tmp_path / name for name in ("first.jsonl", "second.jsonl")]
    for path in texts:
        lines = (json.dumps({"text": f"{path.stem} {i} and {i} " * 20}) for i in range(200))
        path.write_text("\n".join(lines))
    first = ["--data.files", str(texts[0]), "--data.streaming", before]
    run = Run(tmp_path, *first)
    words = ["--data.files", str(texts[1]), "--data.streaming", after]
    words = [*run.longer, "--name", "on", *words]
    seen: list[torch.Tensor] = []
    step = LlamaFoam.training_step

    def record(module: LlamaFoam, batch: Any, *rest: Any) -> Any:
        seen.append(batch["input_ids"])
        return step(module, batch, *rest)

    monkeypatch.setattr(LlamaFoam, "training_step", record)
    assert cli.main(["fit", *words, "--ckpt_path", str(run.lone)]) == 0
    job = parse("fit", [*words, "--data.tokenizer", str(run.lone)], default=None).job()
    data = job.new_data(job.memory_options)
    data.setup()
    data.stream_rows = 24
    loader = data.train_dataloader()
    if (before, after) == ("true", "false"):  # the stream has ended the first epoch
        loader.sampler.set_epoch(1)
    expected = [batch["input_ids"] for batch, _ in zip(loader, seen, strict=False)]
    assert len(seen) == 2
    assert torch.equal(torch.cat(seen), torch.cat(expected))


def test_a_checkpoint_alone_is_as_good_as_in_its_run_folder(run: Run, capfd: Printed) -> None:
    here, there = (
        [
            answer(capfd, "validate", "--ckpt_path", path),
            answer(capfd, "generate", "--ckpt_path", path, "--prompt", "def", "--temperature", 0),
        ]
        for path in (run.checkpoint, run.lone)
    )
    assert here == there
    # With another text, no other text setting of the checkpoint counts.
    text = run.at / "held_out.txt"
    text.write_text("import this\n" * 500)
    other = answer(capfd, "validate", "--ckpt_path", run.lone, "--data.files", text)
    assert other != here[0]


def test_a_checkpoint_alone_knows_its_column(tmp_path: Path, capfd: Printed) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"body": "{i} and {i} {"again " * 20}"}}\n' for i in range(200)))
    run = Run(tmp_path, "--data.files", str(text), "--data.text_column", "body")
    here = answer(capfd, "validate", "--ckpt_path", run.checkpoint)
    # The name of a run is no setting of the text, whatever it is.
    assert answer(capfd, "validate", "--ckpt_path", run.lone, "--name", "files") == here


def test_settings_count_when_a_run_goes_on_in_place(run: Run, capfd: Printed) -> None:
    words = ["--ckpt_path", run.checkpoint, "--trainer.max_steps", 6, "--model.lr", 0.001]
    error = refused(capfd, "fit", *words, "--model.level", 3)
    assert "model.level is 3" in error
    assert "--model.level 2" in error
    words += ["--model.gradient_release", "true", "--model.clip_norm", 2]
    printed = answer(capfd, "fit", *words, "--name", "slower")
    for change in ("model.lr 0.001 (was 0.02)", "model.gradient_release true", "model.clip_norm"):
        assert change in " ".join(printed.split())
    folder = run.at / "runs" / "slower" / "version_0"
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    groups = content["optimizer_states"][0]["param_groups"]
    assert {content["hyper_parameters"]["lr"], *(one["initial_lr"] for one in groups)} == {0.001}
    plan = json.loads((folder / "fold_plan.json").read_text())
    assert plan["lr"] == 0.001
    assert plan["memory_options"]["gradient_release"]
    plan_words = ["--fold-plan", run.folder / "fold_plan.json", "--name", "planned"]
    printed = " ".join(answer(capfd, "fit", *words, *plan_words).split())
    assert "model.clip_norm" in printed
    assert "model.lr" not in printed
    assert "model.gradient_release" not in printed


def test_a_chat_alone_knows_its_template_and_architecture(chat_run: Run, capfd: Printed) -> None:
    here, there = (answer(capfd, "validate", "--ckpt_path", path)
                   for path in (chat_run.checkpoint, chat_run.lone))  # fmt: skip
    assert here == there
    answer(capfd, "export", "--ckpt_path", chat_run.lone, "--output", chat_run.at / "hf")
    exported = AutoTokenizer.from_pretrained(chat_run.at / "hf")
    assert exported.chat_template == CHAT_TEMPLATE
    end = exported.convert_tokens_to_ids("<|end|>")
    stops = json.loads((chat_run.at / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert end in stops
    assert refused(capfd, "generate", "--ckpt_path", chat_run.lone, "--prompt", " ")
    words = ["--runs", chat_run.at / "runs", "--name", "on", "--data.cache_dir", chat_run.at / "c"]
    words += ["--trainer.max_steps", 6, "--trainer.accelerator", "cpu", "--data.num_workers", 0]
    assert "training: 6 steps" in answer(capfd, "fit", "--ckpt_path", chat_run.lone, *words)


def test_a_tokenizer_with_other_ids_is_refused(run: Run, capfd: Printed) -> None:
    save_tokenizer(run.at / "another", template=None)
    words = ["--ckpt_path", run.lone, "--data.tokenizer", run.at / "another"]
    for command in ("validate", "fit"):
        error = refused(capfd, command, *words, *(run.longer if command == "fit" else ()))
        assert "of 320 tokens" in error
        assert "remove data.tokenizer" in error
    same = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
    same.chat_template = CHAT_TEMPLATE
    same.save_pretrained(run.at / "same")
    words[-1] = run.at / "same"
    assert answer(capfd, "validate", *words) == answer(capfd, "validate", *words[:2])


def test_an_edited_template_of_a_named_tokenizer_counts(
    chat_run: Run, tmp_path: Path, capfd: Printed
) -> None:
    named = tmp_path / "named"
    tokenizer = load_saved_tokenizer(chat_run.lone)
    tokenizer.save_pretrained(named)
    words = ["--ckpt_path", chat_run.lone, "--data.tokenizer", named]
    more = ["--runs", tmp_path, "--data.cache_dir", tmp_path / "c", "--trainer.max_steps", 5]
    more += ["--trainer.accelerator", "cpu", "--data.num_workers", 0]
    answer(capfd, "fit", *words, *more)
    words[1] = tmp_path / "default" / "version_0" / "checkpoints" / "last.ckpt"
    before = answer(capfd, "validate", *words)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("\n", ":")
    tokenizer.save_pretrained(named)
    assert answer(capfd, "validate", *words) != before
    shutil.rmtree(named)
    assert answer(capfd, "validate", *words) == before


def test_a_pretrained_model_with_other_tokens_is_warned_of(tmp_path: Path, capfd: Printed) -> None:
    pretrained = save_pretrained(tmp_path / "pretrained", "llama-2")
    save_tokenizer(tmp_path / "another", vocab_size=310, template=None)
    words = ["--model.pretrained", str(pretrained), "--data.tokenizer"]
    Run(tmp_path, *words, str(tmp_path / "another"))
    assert "gives 10 of the 320 tokens" in capfd.readouterr().err


def test_a_checkpoint_of_an_older_version_needs_its_run_folder(run: Run, capfd: Printed) -> None:
    for command in ("generate", "validate", "fit", "export"):
        more = {"fit": run.longer, "export": ["--output", run.at / "none"]}.get(command, [])
        error = refused(capfd, command, "--ckpt_path", run.old, *more)
        assert "no tokenizer" in error
        assert "run folder" in error
    moved = Path(shutil.copy(run.old, run.folder / "checkpoints" / "old.ckpt"))
    found, given = (
        answer(capfd, "validate", "--ckpt_path", path, *more, *run.words)
        for path, more in [(moved, []), (run.old, ["--data.tokenizer", run.folder / "tokenizer"])]
    )
    assert found == given == answer(capfd, "validate", "--ckpt_path", run.checkpoint)


def with_tokenizer(path: Path, run: Run, files: Any) -> Path:
    content = torch.load(run.lone, weights_only=True)
    content["TextData"]["tokenizer"] = files
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": torch.zeros(3, dtype=torch.uint8)},
        {"../evil": torch.zeros(3, dtype=torch.uint8)},
        {"tokenizer.json": 5},
        [1],
    ],
    ids=str,
)
def test_a_bad_tokenizer_in_a_checkpoint_is_one_line(
    files: Any, run: Run, tmp_path: Path, capfd: Printed
) -> None:
    path = with_tokenizer(tmp_path / "bad.ckpt", run, files)
    with pytest.raises(CheckpointError) as caught:
        load_saved_tokenizer(path)
    assert "\n" not in str(caught.value)
    assert "cannot load the tokenizer" in refused(capfd, "generate", "--ckpt_path", path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.ckpt"]
