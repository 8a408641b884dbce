"""What a stranger does with a published repository: functions for a process with transformers and torch alone."""

import contextlib
import io
import logging
import re
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)


def load(repo, revision=None):
    return AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True).eval()


def answers(repo, ids, revision=None):
    return answers_of(load(repo, revision), ids)


def answers_of(model, ids):
    """Logits and a greedy continuation, which uses the cache, as lists."""
    ids = torch.tensor(ids)
    with torch.no_grad():
        return model(ids).logits.tolist(), model.generate(ids, max_new_tokens=8, do_sample=False).tolist()


def importable(*packages):
    found = []
    for package in packages:
        try:
            __import__(package)
            found.append(package)
        except ImportError:
            pass
    return found


def answers_side_by_side(repositories, ids):
    """Load every (repository, revision) first, then ask each."""
    models = [load(repo, revision) for repo, revision in repositories]
    return [answers_of(model, ids) for model in models], [type(model).__module__ for model in models]


def operators():
    """Namespaces of the operators of DeltaNet in this process."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.split("::")[0] for name in names if "delta_rule" in name})


def logits_and_log(repo, ids, device):
    """Logits on a device, and what the model logs of the implementation that it takes there."""
    log = io.StringIO()
    logger = logging.getLogger("deltanet.kernels")
    logger.addHandler(logging.StreamHandler(log))
    logger.setLevel(logging.INFO)
    with torch.no_grad():
        logits = load(repo).to(device)(torch.tensor(ids, device=device)).logits
    return logits.tolist(), log.getvalue()


def save_again(repo, directory, ids):
    """The files of a copy saved from the loaded model, and the answers of the model loaded from it."""
    load(repo).save_pretrained(directory)
    return sorted(path.name for path in Path(directory).iterdir()), answers(directory, ids)


def fine_tune(repo, ids):
    """The loss before and after three steps, and the names of parameters without gradient."""
    model, ids = load(repo).train(), torch.tensor(ids)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def classes(repo):
    """The classes that the Auto classes find, by module and name."""
    autos = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification)
    found = [type(auto.from_pretrained(repo, trust_remote_code=True)).__name__ for auto in autos]
    config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
    return [*found, type(config).__name__]


def complete(repo, text, tokens):
    """Text of pipeline("text-generation"), and what the example on the model card prints."""
    pipe = pipeline("text-generation", model=repo, trust_remote_code=True, device="cpu")
    piped = pipe(text, max_new_tokens=tokens, do_sample=False)[0]["generated_text"]
    example = re.search(r"```python\n(.+?)```", ModelCard.load(repo).text, re.DOTALL)[1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example, {})
    return piped, printed.getvalue().strip("\n")


def refusal(repo):
    """What loading says when it fails."""
    try:
        load(repo)
    except OSError as error:
        return str(error)
    return None


def bits_per_byte(repo, tasks, task, texts):
    """lm-eval's figure for a task in the folder `tasks`, and the same from the logits."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": repo, "trust_remote_code": True, "dtype": "float32"}
    manager = TaskManager(include_path=tasks, include_defaults=False)
    evaluated = simple_evaluate("hf", arguments, [task], task_manager=manager, device="cpu", bootstrap_iters=0)
    model, tokenizer = load(repo), AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    nats = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
        nats -= logits.gather(1, ids[0, 1:, None]).sum().item()
    size = sum(len(text.encode()) for text in texts)
    return evaluated["results"][task]["bits_per_byte,none"], nats / size / torch.tensor(2.0).log().item()
