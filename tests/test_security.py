"""Hostile configurations, checkpoints, folders and environments run no code and get no secret."""

import ast
import inspect
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from transformers import AutoTokenizer

import cli
from foam_lightning.data.chat import encode_chat
from foam_lightning.data.conversations import Conversation
from foam_lightning.errors import ConfigError, DataError
from foam_lightning.model.pretrained import parse_config
from tests.support.pretrained import save_pretrained, save_tokenizer
from tests.support.tiny import REPOSITORY, write_settings
from tests.test_layers import FILES, path_id
from tuner.config.allowed_classes import CALLBACKS
from tuner.config.early_checks import check_config
from tuner.config.parser import parse

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


def calls(path: Path, name: str) -> Iterator[ast.Call]:
    """Find the calls of what has this last name, in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == name:
            yield node


def said(call: ast.Call, keyword: str) -> str:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == keyword), "nothing")


# ---- the code itself


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_tensors_are_loaded_as_weights_only(path: Path) -> None:
    for call in calls(path, "load"):
        if ast.unparse(call.func) == "torch.load":
            assert said(call, "weights_only") == "True"
    for call in calls(path, "fit"):
        if ast.unparse(call.func) == "trainer.fit" and said(call, "ckpt_path") != "nothing":
            assert said(call, "weights_only") == "True"


@pytest.mark.parametrize("path", FILES, ids=path_id)
def test_nothing_that_transformers_loads_may_bring_code(path: Path) -> None:
    for call in calls(path, "from_pretrained"):
        if ast.unparse(call.func).startswith("Auto"):
            assert said(call, "trust_remote_code") == "False"
    text = path.read_text(encoding="utf-8")
    assert "trust_remote_code=True" not in text
    tree = ast.parse(text)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "pickle", "dill", "cloudpickle", "marshal"}


def test_the_checks_find_what_they_look_for() -> None:
    assert sum(1 for path in FILES for _ in calls(path, "from_pretrained")) >= 3
    loads = [call for path in FILES for call in calls(path, "load")]
    assert sum(ast.unparse(call.func) == "torch.load" for call in loads) >= 2


# ---- class paths


def test_what_may_be_named_takes_no_class_no_function_and_no_path() -> None:
    for callback in CALLBACKS:
        for name, hint in get_type_hints(callback.__init__).items():
            assert not {"Callable", "Path", "Any"} & set(str(hint).replace("[", ".").split(".")), (
                name
            )
            assert "dir" not in name
            assert "path" not in name
        kinds = {p.kind for p in inspect.signature(callback.__init__).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds


@pytest.mark.filterwarnings("ignore")
def test_code_of_a_configuration_runs_with_the_flag_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "mine_alone.py").write_text(
        "from pathlib import Path\nfrom lightning.pytorch import Callback\n"
        f"Path({str(ran)!r}).touch()\nclass Mine(Callback): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    hostile = tmp_path / "hostile.yaml"
    hostile.write_text("trainer: {callbacks: [{class_path: mine_alone.Mine}]}")
    words = ["plan", "--config", str(write_settings(tmp_path)), "--config", str(hostile)]
    words += ["--uniform-level", "1"]
    assert cli.main(words) == 2
    assert "--allow-class-paths mine_alone.Mine" in capfd.readouterr().err
    assert not ran.exists()
    assert cli.main([*words, "--allow-class-paths", "other_package,mine_alone.Mine"]) == 0
    assert ran.exists()


def test_a_callback_of_the_list_is_made(tmp_path: Path) -> None:
    path = write_settings(tmp_path)
    (tmp_path / "more.yaml").write_text(
        "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: x}}, "
        "{class_path: lightning.pytorch.callbacks.LearningRateMonitor}]}"
    )
    words = ["--config", str(path), "--config", str(tmp_path / "more.yaml")]
    made = parse("fit", words, default=None).job().trainer.arguments["callbacks"]
    assert [type(one).__name__ for one in made] == ["EarlyStopping", "LearningRateMonitor"]


def test_what_print_config_prints_is_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "--print_config"])
    assert caught.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert "allow_class_paths: null" in path.read_text()
    check_config(path)
    assert parse("plan", ["--config", str(path)], default=None).job().trainer.max_steps == 600


def test_a_mapping_that_looks_like_a_class_stays_a_mapping() -> None:
    looks = '[{"weight": 1, "text_column": {"class_path": "collections.Counter"}}]'
    parsed = parse("plan", ["--data.sources", looks], default=None)
    assert parsed.values.data.sources[0]["text_column"] == {"class_path": "collections.Counter"}


def test_option_values_are_read_by_the_checked_yaml_loader() -> None:
    # Fails if jsonargparse no longer takes the loader that tuner.config.parser gives it.
    with pytest.raises(ConfigError, match=r"data\.sources"):
        parse("plan", ["--data.sources", '[{"weight": 1, "weight": 2}]'], default=None)


def test_settings_do_not_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for name in ("CLI.PY PLAN_NAME", "CLI_PLAN_NAME", "PLAN_NAME", "CLI__NAME", "NAME"):
        monkeypatch.setenv(name, "hostile")
    default = REPOSITORY / "configs" / "default.yaml"
    assert parse("plan", [], default=default).name == "default"
    assert parse("plan", ["--name", "${oc.env:HOME}"], default=default).name == "${oc.env:HOME}"


# ---- tokenizers, templates, folders


def conversation() -> list[dict[str, str]]:
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum.__globals__['os'].popen('touch hacked').read() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_a_chat_template_is_kept_in_its_sandbox(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "tokenizer", template=template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="chat template fails"):
        encode_chat(tokenizer, Conversation(conversation()), "line 1")
    assert not (tmp_path / "hacked").exists()


def test_a_kernel_that_a_folder_names_is_not_looked_for(tmp_path: Path) -> None:
    folder = save_pretrained(tmp_path / "folder", "llama-2")
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = ("attn_implementation", "_attn_implementation", "experts_implementation")
    config = parse_config({**content, **dict.fromkeys(names, "evil/kernel")}, "config.json")
    assert config._attn_implementation is None
    assert "evil" not in json.dumps(config.to_dict())


# ---- secrets


@pytest.mark.parametrize(
    "value",
    ["https://me:secret@host/data", "s3://key:secret@bucket/x", f"see {SECRET}", {SECRET: [1]}],
)
def test_passwords_and_tokens_in_a_configuration_are_refused_and_not_shown(
    value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps({"data": {"sources": [{"dataset": value}]}}))
    with pytest.raises(ConfigError, match="a password or a token") as caught:
        check_config(path)
    assert "secret" not in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("value", ["https://host/data", "me@host:data", "a:b@c", "hf_short"])
def test_other_names_are_no_secrets(value: str, tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(json.dumps({"data": {"dataset": value}}))
    check_config(path)


# ---- what a run leaves


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mask", [0o027, 0o002], ids=oct)
def test_a_run_takes_the_umask_and_holds_no_secret(
    mask: int,
    tmp_path: Path,
    umask: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import fsspec.implementations.local

    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    os.umask(mask)
    # A process has one umask in its life, and fsspec asks for it once.
    local = fsspec.implementations.local
    if hasattr(local, "get_umask"):
        local.get_umask.cache_clear()
    settings = write_settings(tmp_path)
    words = ["--config", str(settings), "--trainer.max_steps", "4"]
    assert cli.main(["fit", *words]) == 0
    run = tmp_path / "runs" / "default" / "version_0"
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    assert cli.main(["export", "--ckpt_path", checkpoint, "--output", str(tmp_path / "hf")]) == 0
    picture = ["--uniform-level", "1", "--picture", str(tmp_path / "plan.png")]
    assert cli.main(["plan", *words, *picture]) == 0
    found = sorted(tmp_path.rglob("*"))
    assert {"last.ckpt", "model.safetensors", "tokenizer.json", "plan.png"} <= {
        p.name for p in found
    }
    for path in found:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(wanted), path
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    out, err = capfd.readouterr()
    assert SECRET not in out + err


@pytest.mark.parametrize("mask", [0o027, 0o002], ids=oct)
def test_a_study_takes_the_umask(mask: int, tmp_path: Path, umask: None) -> None:
    from tuner.trials.study import Study
    from tuner.trials.workers import Worker

    os.umask(mask)
    with Worker(tmp_path, "tune") as worker:
        Study(tmp_path / "study.db", "stage", seed=0, worker=worker)
        for path in tmp_path.rglob("*"):
            wanted = (0o777 if path.is_dir() else 0o666) & ~mask
            assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(wanted), path
