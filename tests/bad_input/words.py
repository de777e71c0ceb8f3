"""What is typed: commands, flags, budgets, numbers."""

from tests.bad_input.case import Case, plan

USAGE = [
    Case("unknown command", "train", "there is no command 'train'"),
    Case("misspelt command", "fti", "did you mean fit?"),
    Case("empty command", "", "there is no command ''", more=("",)),
    Case("option for a command", "--memory-budget 24GB", "there is no command"),
    Case("misspelt flag", "fit --trainer.max_step 3", "did you mean --trainer.max_steps?"),
    Case("misspelt flag with =", "fit --model.levle=3", "did you mean --model.level?"),
    Case("abbreviated flag", "fit --conf x.yaml", "did you mean --config?"),
    Case("word without a flag", "fit now", "unrecognized arguments: now"),
    Case("flag of another command", "fit --prompt hello", "--prompt"),
    Case("flag without a value", "fit --name", "--name"),
    Case("last flag without a value", "fit --config", "--config needs a value"),
    Case("section with a file", "fit --model other.yaml", "whole section"),
    Case("section with a mapping", "fit --trainer={}", "whole section"),
    Case("export without an output", "export --ckpt_path x.ckpt", "output"),
    Case("export without a checkpoint", "export --output out", "ckpt_path"),
    Case("generate without a checkpoint", "generate", "ckpt_path"),
    Case("tune without a budget", "tune --config {good}/tiny.yaml", "tune needs --memory-budget"),
    Case("plan without a budget", "plan --config {good}/tiny.yaml", "plan needs --memory-budget"),
    *(
        Case(f"{command} with {flag}", f"{command} --config {{good}}/tiny.yaml {flag}", "remove it")
        for command, flags in {
            "compare": (
                "--memory-budget 24GB",
                "--fold-plan=x.json",
                "--fold_plan x.json",
                "--trainer.max_steps 9",
                "--tune.steps=9",
            ),
            "tune": ("--fold-plan x.json",),
            "validate": ("--memory_budget 24GB",),
            "export": ("--fold-plan x.json",),
        }.items()
        for flag in flags
    ),
    Case(
        "compare with a budget in a file",
        "compare --config {good}/tiny.yaml --config {at}/b.yaml",
        "remove --memory-budget",
        files={"b.yaml": "memory_budget: 24GB"},
    ),
    Case("plan of a missing plan", "plan --config {good}/tiny.yaml --fold-plan x.json", "x.json"),
    Case("a value for --debug", "fit --debug=yes", "debug"),
    *(
        Case(f"trainer: {name}", f"fit --config {{good}}/tiny.yaml --trainer.{flag}", says)
        for name, flag, says in [
            ("no such GPU", "accelerator=gpu --trainer.devices=99", "trainer"),
            ("a TPU", "accelerator tpu", "cpu, gpu"),
            ("an accelerator by a wrong name", "accelerator=graphics", "cpu, gpu"),
            (
                "a monitor nobody logs",
                "callbacks EarlyStopping --trainer.callbacks.monitor val_loss",
                "did you mean validation/loss?",
            ),
            (
                "a callback's wrong time",
                "callbacks Timer --trainer.callbacks.duration 5m",
                "DD:HH:MM:SS",
            ),
            ("a logger by a wrong name", "logger neptune", "'wandb'"),
            ("no logger", "logger false", "TensorBoard"),
            ("a logger without its package", "logger comet", "pip install comet-ml"),
            ("a profiler by a wrong name", "profiler fast", "simple"),
            ("no checkpoints", "enable_checkpointing false", "trainer.enable_checkpointing"),
            ("a dry run", "fast_dev_run true", "trainer.max_steps 2"),
            ("overfitting", "overfit_batches 2", "data.files"),
            ("a clipping algorithm alone", "gradient_clip_algorithm norm", "gradient_clip_val"),
            (
                "an unknown clipping algorithm",
                "gradient_clip_val 1 --trainer.gradient_clip_algorithm both",
                "both",
            ),
            ("a folder of its own", "default_root_dir x", "--runs"),
            ("an evaluation in no time", "val_check_interval soon", "soon"),
        ]
    ),
    Case("a Unicode dash", "fit —config x.yaml", "unrecognized arguments"),
    Case("unknown format", "plan --format xml --memory-budget 1GB", "format"),
    Case("a key within a number", "fit --model.lr.x 3", "model.lr"),
    Case("NUL in a path", "fit --config", "cannot read", more=("a\0b",)),
    Case("half a surrogate pair", "fit --config", "cannot read", more=("\ud800",)),
]

BUDGETS = [
    Case(f"budget {text!r}", "fit", says, code, more=(f"--memory-budget={text}",))
    for text, says, code in [
        ("", "is not a memory size", 2),
        ("0", "is not a memory size", 2),
        ("0GB", "must be above zero", 2),
        ("-1GB", "is not a memory size", 2),
        ("1e400GB", "is not a memory size", 2),
        ("nan", "is not a memory size", 2),
        ("infGB", "is not a memory size", 2),
        ("24", "is not a memory size", 2),
        ("GB", "is not a memory size", 2),
        ("24 G B", "is not a memory size", 2),
        ("24GBB", "is not a memory size", 2),
        ("24,5GB", "is not a memory size", 2),
        ("1_000GB", "is not a memory size", 2),
        ("٢٤GB", "is not a memory size", 2),
        ("²GB", "is not a memory size", 2),
        ("24ＧＢ", "is not a memory size", 2),  # noqa: RUF001
        ("0x18GB", "is not a memory size", 2),
        ("24GB\n25GB", "is not a memory size", 2),
        ("9" * 5000 + "GB", "is not a memory size", 2),
        ("1." + "0" * 5000 + "GB", "is not a memory size", 2),
        ("0.1B", "must be above zero", 2),
    ]
]
INFEASIBLE = [
    Case(f"{command} of {size}", f"{command} --config {{good}}/tiny.yaml", "too small", 3,
         more=("--memory-budget", size))
    for command in ("plan", "fit", "tune") for size in ("1B", " 24 kB ")
]  # fmt: skip

NUMBERS = [
    plan(f"{setting} {value}", f"--{setting}={value}", setting.rpartition(".")[2])
    for setting, values in {
        "model.lr": ".nan .inf nan -1 0 high 1e999 1,5 [1] null",
        "model.betas": "0.9 [0.9] [0.9,1.0] [-0.1,0.9] [.nan,0.9] [0.9,0.9,0.9]",
        "model.eps": ".nan .inf nan -1e-8",
        "model.weight_decay": "-0.1 .nan .inf",
        "model.scale": "-1 .nan .inf 0",
        "model.unfolded_scale": "-1 .nan .inf 0",
        "model.residual_scale": "-1 .nan .inf",
        "model.clip_norm": "0 -1 .nan .inf",
        "model.warmup_fraction": "-0.1 1.1 .nan",
        "model.decay_fraction": "-0.1 1.1 .nan",
        "model.final_lr_fraction": "-0.1 1.1 .nan",
        "model.schedule": "polynomial null",
        "model.level": "-1 1.5 1000000000 9223372036854775808",
        "model.hidden_size": "0 -32 33 99999999999999999999",
        "model.intermediate_size": "0 99999999999999999999",
        "model.num_hidden_layers": "0 -1 1000000000",
        "model.num_attention_heads": "0 3 -2",
        "model.num_key_value_heads": "-1 3 0",
        "model.vocab_size": "0 -1 99999999999999999999",
        "model.max_position_embeddings": "0",
        "model.optimizer": "sgd",
        "model.state_dtype": "float64",
        "model.second_moment": "cube",
        "model.exclude": "[ (",
        "data.sequence_length": "0 1 -1 many 99999999999999999999",
        "data.batch_size": "0 -4 99999999999999999999",
        "data.micro_batch_size": "0 3 -1 5",
        "trainer.max_steps": "0 -1 many 1.5 nan",
        "trainer.precision": "8-true 16-true 64 16-mixed 16",
        "trainer.devices": "0 many",
        "trainer.strategy": "deepspeed",
        "trainer.accumulate_grad_batches": "4",
        "seed_everything": "-1 1.5 99999999999999999999",
        "tune.fraction": "0 -1 .nan .inf",
        "tune.trials": "0",
        "tune.steps": "-1",
        "uniform-level": "-1 99 1000000000000",
        "tensors": "-1 x",
    }.items()
    for value in values.split()
]
