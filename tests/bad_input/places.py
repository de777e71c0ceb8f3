"""Places to write to; what else a command is told."""

from tests.bad_input.case import Case, fit, plan

_LONG = "x" * 300
_TINY = "--config {good}/tiny.yaml "
PLACES = [
    *(
        Case(f"place: a long name, {words.replace(_TINY, '')}", words + _LONG + end, says)
        for words, end, says in [
            ("fit --config ", "", "File name too long"),
            ("fit --config {good}/tiny.yaml --fold-plan ", "", "File name too long"),
            ("fit --config {good}/tiny.yaml --ckpt_path ", "", "there is no checkpoint"),
            ("export --output {at}/out --ckpt_path ", "", "there is no checkpoint"),
            ("export --ckpt_path {good}/run/checkpoints/last.ckpt --output ", "", "too long"),
            ("compare --config {good}/tiny.yaml --data.files ", ".txt", "there is no file"),
            ("fit --config {good}/tiny.yaml --model.pretrained ", "", "no config.json"),
            ("compare --config {good}/tiny.yaml --data.tokenizer ", "", "cannot load"),
            ("compare --config {good}/tiny.yaml --data.cache_dir ", "", "too long"),
            ("fit --config {good}/tiny.yaml --runs ", "", "at most 200 bytes"),
        ]
    ),
    Case("place: an endless name", "fit --config", "...", more=("x" * 5000,)),
    fit("place: runs that is a file", "--runs {at}/f", "run folder", files={"f": "x"}),
    fit("place: runs below a file", "--runs {at}/f/g", "run folder", files={"f": "x"}),
    fit("place: runs in /proc", "--runs /proc/runs", "run folder"),
    fit("place: a name that is empty", "--name=", "name"),
    fit("place: a name that leads out", "--name ../../out", "name"),
    fit("place: an absolute name", "--name {at}/out", "name"),
    fit("place: a name of 300 letters", f"--name {'n' * 300}", "name"),
    fit("place: a name with a line break", "--name", "printable", more=("a\nb",)),
    fit("place: a name of half a character", "--name", "printable", more=("\ud800",)),
    fit("place: a name with NUL", "--name", "name", more=("a\0b",)),
    plan("place: a picture in no folder", "--picture {at}/no/plan.png", "cannot write the"),
    plan("place: a picture that is a folder", "--picture {at}", "cannot write the picture"),
    Case("place: export over a folder", "export --ckpt_path {good}/run/checkpoints/last.ckpt "
         "--output {at}/out", "not an empty folder", files={"out/x": "x"}),
    Case("place: export over a file", "export --ckpt_path {good}/run/checkpoints/last.ckpt "
         "--output {at}/out", "not an empty folder", files={"out": "x"}),
    Case("place: export below a file", "export --ckpt_path {good}/run/checkpoints/last.ckpt "
         "--output {at}/f/out", "cannot write", files={"f": "x"}),
    Case("place: compare below a file", "compare --config {good}/tiny.yaml --optimizers adamw "
         "--runs {at}/f --steps 1 --seeds 1", "cannot write", files={"f": "x"}, has_begun=True),
]  # fmt: skip
_COMPARE = "compare --config {good}/tiny.yaml"
_WRITE = "generate --ckpt_path {good}/run/checkpoints/last.ckpt"
REST = [
    Case("compare: an unknown optimizer", f"{_COMPARE} --optimizers foam,sgd", "sgd"),
    Case("compare: no optimizer", f"{_COMPARE} --optimizers ,", "optimizer"),
    Case("compare: no steps", f"{_COMPARE} --steps 0", "--steps"),
    Case("compare: no seeds", f"{_COMPARE} --seeds 0", "--seeds"),
    Case("generate: no tokens", f"{_WRITE} --max_new_tokens 0", "max_new_tokens"),
    Case("generate: fewer than none", f"{_WRITE} --max_new_tokens -5", "max_new_tokens"),
    Case("generate: too cold", f"{_WRITE} --temperature -1", "temperature"),
    Case("generate: NaN degrees", f"{_WRITE} --temperature .nan", "temperature"),
    Case("generate: infinitely hot", f"{_WRITE} --temperature .inf", "temperature"),
    fit("trainer: no batches", "--trainer.limit_train_batches 0", "limit_train_batches"),
    fit("trainer: a negative interval", "--trainer.val_check_interval -1", "val_check_interval"),
    fit("trainer: an interval of 0", "--trainer.val_check_interval 0", "val_check_interval"),
    fit("trainer: no validation", "--trainer.limit_val_batches 0", "limit_val_batches"),
    fit("trainer: log never", "--trainer.log_every_n_steps=-1", "log_every_n_steps"),
    fit("trainer: barebones", "--trainer.barebones true", "barebones"),
    fit("trainer: an unknown accelerator", "--trainer.accelerator abacus", "abacus"),
    fit("trainer: an unknown profiler", "--trainer.profiler stopwatch", "profiler"),
    fit("trainer: negative clipping", "--trainer.gradient_clip_val -1", "gradient_clip_val"),
    fit("trainer: unknown clipping", "--trainer.gradient_clip_algorithm cube", "cube"),
    fit("trainer: no nodes", "--trainer.num_nodes 0", "num_nodes"),
    fit("trainer: a time that is none", "--trainer.max_time soon", "DD:HH:MM:SS"),
    fit("trainer: no epochs", "--trainer.max_epochs 0", "max_epochs"),
    fit("trainer: epochs of a stream",
        "--trainer.max_steps -1 --trainer.max_epochs 1 --data.streaming true",
        "set trainer.max_steps"),
    fit("trainer: less than a step", "--trainer.limit_train_batches 1e-6", "less than one"),
    fit("trainer: a baseline without its package", "--model.optimizer adamw8bit", "torchao"),
    fit("trainer: a baseline with a budget", "--model.optimizer adamw --memory-budget 1GB",
         "does not support"),
    fit("trainer: releasing baseline", "--model.optimizer adamw --model.gradient_release true",
         "does not support"),
    fit("trainer: state offload on a CPU", "--model.state_offload true", "needs a GPU"),
    fit("trainer: gradients in host memory on a CPU", "--model.grad_offload true", "needs a GPU"),
]  # fmt: skip
