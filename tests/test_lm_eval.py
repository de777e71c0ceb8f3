"""The exported folder under lm-eval, with a task of this machine, against plain transformers."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install -e '.[eval]'")

# As lambada: how likely is the last word, and is it the likeliest?
TASK = """
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {texts}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.rsplit(' ', 1)[0]}}}}"
doc_to_target: " {{{{text.rsplit(' ', 1)[1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def last_words(folder, texts):
    """Give perplexity and accuracy of the last word of every text, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats, hits = [], []
    for text in texts:
        start = len(tokenizer(text.rsplit(" ", 1)[0])["input_ids"])
        ids = torch.tensor(tokenizer(text)["input_ids"])
        with torch.no_grad():
            scores = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        nats.append(float(scores.gather(1, ids[start:, None]).sum()))
        hits.append(bool((scores.argmax(-1) == ids[start:]).all()))
    return math.exp(-sum(nats) / len(nats)), sum(hits) / len(hits)


@pytest.mark.slow
def test_lm_eval_scores_the_exported_folder_as_transformers_does(finished, tmp_path):
    texts = [f"{i} and {i * i % 97} make {i * 3}." for i in range(0, 1000, 25)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "last_word.yaml").write_text(TASK.format(texts=file))
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf"),
        *("--model_args", f"pretrained={finished.folder.hf}", "--tasks", "last_word"),
        *("--include_path", str(tmp_path), "--device", "cpu"),
        *("--output_path", str(tmp_path / "results.json")),
    ]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    subprocess.run(command, check=True, env=os.environ | environment)
    (written,) = tmp_path.glob("results*.json")
    found = json.loads(written.read_text())["results"]["last_word"]
    perplexity, accuracy = last_words(finished.folder.hf, texts)
    assert found["perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
    assert found["acc,none"] == accuracy
