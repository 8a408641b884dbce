"""What a training run is made of, as a YAML file with flags over it; every value is checked before anything starts."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError

from .. import DeltaNetConfig

RECIPES = Path(__file__).parent / "recipes"
SHIPPED = "shipped"
HYBRIDS = ("sliding_window", "global_attention")
COUNTS = (
    "tokens", "batch_tokens", "block_length", "device_batch", "log_every", "save_every", "evaluate_every",
    "keep_checkpoints",
)  # fmt: skip
PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "warmup_stable_decay")
FREE_TO_CHANGE = (
    "output", "gradient_checkpointing", "torch_compile", "keep_checkpoints", "verify_data", "report_to", "heldout",
    "evaluate_every",
)  # fmt: skip
"""Fields that a continued run may change: they do not touch the losses, rounding apart."""


class _Loader(yaml.SafeLoader):
    """YAML that reads `3e-4` as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


@dataclass(frozen=True)
class Recipe:
    """One training run. Lengths of a run are in tokens; a step is one change of the weights."""

    data: str  # directory of `deltanet.train.prepare`, or "shipped"
    tokens: int  # of the whole run
    batch_tokens: int  # of one step, over all devices and accumulated batches
    learning_rate: float  # the highest
    output: str = ""  # directory of checkpoints and of the finished model; by default runs/NAME
    model: dict = field(default_factory=dict)  # fields of DeltaNetConfig
    pretrained: str | None = None  # directory or Hub id of a model to fine-tune, instead of `model` and `hybrid`
    hybrid: str | None = None
    window: int = 2048  # of the sliding-window hybrid
    packing: bool = False  # keep documents apart; a block then has at most `block_length` tokens
    block_length: int = 2048
    optimizer: str = "adamw"  # or muon: for matrices, with AdamW for the rest and the same learning rate
    schedule: str = "cosine"  # or warmup_stable_decay: constant, then linear to the final rate over `decay_tokens`
    warmup_tokens: int = 0
    decay_tokens: int = 0  # of warmup_stable_decay
    initial_learning_rate: float = 0.0
    final_learning_rate: float = 0.0
    weight_decay: float = 0.01
    betas: list = field(default_factory=lambda: [0.9, 0.95])
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    precision: str = "bfloat16"
    device_batch: int = 1  # blocks in one forward
    gradient_checkpointing: bool = False  # less memory: computes all of a block twice but the delta rule
    torch_compile: bool = False
    seed: int = 0
    log_every: int = 10  # steps
    save_every: int = 1000  # steps
    keep_checkpoints: int = 2
    verify_data: bool = True  # read all shards and compare their checksums
    report_to: str = "none"  # tensorboard, wandb, ...
    heldout: str | None = None  # text whose bits per byte are logged: "shipped", or a file or directory as for `prepare`
    evaluate_every: int = 1000  # steps
    keep_best: bool = False  # finish with the weights of the fewest such bits, not with the last ones
    data_checksum: str | None = None  # of the data's index; filled in by a run, refused when it differs

    def __post_init__(self):
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, _typed(spec, getattr(self, spec.name)))
        for name in COUNTS:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 and more")
        for name in ("initial_learning_rate", "final_learning_rate"):
            valid = 0 <= getattr(self, name) <= self.learning_rate
            _require(valid, name, getattr(self, name), f"0 to `learning_rate` = {self.learning_rate}")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a number above 0")
        _require(0 <= self.warmup_tokens < self.tokens, "warmup_tokens", self.warmup_tokens, f"0 to below {self.tokens}")
        _require(not self.keep_best or self.heldout, "keep_best", self.keep_best, "false without `heldout`")
        self._check_schedule()
        valid = len(self.betas) == 2 and all(isinstance(beta, float) and 0 <= beta < 1 for beta in self.betas)
        _require(valid, "betas", self.betas, "two numbers like 0.9")
        _require(self.hybrid in (None, *HYBRIDS), "hybrid", self.hybrid, f"null, {', '.join(HYBRIDS)}")
        _require(self.precision in PRECISIONS, "precision", self.precision, ", ".join(PRECISIONS))
        _require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, ", ".join(OPTIMIZERS))
        forward = self.device_batch * self.block_length
        allowed = f"multiples of `device_batch` x `block_length` = {self.device_batch} x {self.block_length} = {forward}"
        _require(self.batch_tokens % forward == 0, "batch_tokens", self.batch_tokens, allowed)
        _require(self.tokens >= self.batch_tokens, "tokens", self.tokens, f"`batch_tokens` = {self.batch_tokens} and more")
        allowed = f"multiples of `log_every` = {self.log_every}, so that a continued run logs the same averages"
        _require(self.save_every % self.log_every == 0, "save_every", self.save_every, allowed)
        allowed = f"fields of DeltaNetConfig: {', '.join(sorted(_model_fields()))}"
        unknown = sorted(self.model.keys() - _model_fields())
        _require(not unknown, "model", ", ".join(unknown), allowed)
        valid = self.pretrained is None or not (self.model or self.hybrid)
        _require(valid, "pretrained", self.pretrained, "null where `model` or `hybrid` says what to train from scratch")
        try:
            self.config()
        except StrictDataclassError as error:
            raise ValueError(f"Recipe: `model` is not allowed. {error}") from error

    def _check_schedule(self) -> None:
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, ", ".join(SCHEDULES))
        if self.schedule == "cosine":
            _require(self.decay_tokens == 0, "decay_tokens", self.decay_tokens, "0, save with warmup_stable_decay")
            return
        most = self.tokens - self.warmup_tokens
        valid = self.batch_tokens <= self.decay_tokens <= most
        allowed = f"`batch_tokens` = {self.batch_tokens} to {most}, which warm-up leaves"
        _require(valid, "decay_tokens", self.decay_tokens, allowed)
        # Transformers' schedule has one number for both.
        valid = self.initial_learning_rate == self.final_learning_rate
        allowed = f"`final_learning_rate` = {self.final_learning_rate}, with warmup_stable_decay"
        _require(valid, "initial_learning_rate", self.initial_learning_rate, allowed)

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def warmup_steps(self) -> int:
        return self.warmup_tokens // self.batch_tokens

    @property
    def decay_steps(self) -> int:
        return self.decay_tokens // self.batch_tokens

    @property
    def accumulation(self) -> int:
        return self.batch_tokens // (self.device_batch * self.block_length)

    @property
    def blocks_per_step(self) -> int:
        return self.batch_tokens // self.block_length

    def config(self, **fields) -> DeltaNetConfig:
        """Configuration of the model; the recipe's own fields take precedence over those given here."""
        config = DeltaNetConfig(**{"max_position_embeddings": self.block_length, **fields, **self.model})
        if self.hybrid == "sliding_window":
            return config.with_sliding_window(self.window)
        return config.with_global_attention() if self.hybrid else config

    def write(self, path: Path) -> None:
        text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
        path.write_text(f"# Resolved: the recipe's file, the flags and the defaults.\n{text}", encoding="utf-8")


def load_recipe(name: str, flags: dict[str, str]) -> Recipe:
    """The recipe of a file, or of a shipped one by its name, with `flags` over it (`model.hidden_size` for a field of it).

    Raises:
        ValueError: there is no such file, a key is unknown or missing, or a value is not allowed.
    """
    values = _read(name)
    for key, text in flags.items():
        first, _, second = key.partition(".")
        value = yaml.load(text, _Loader)
        if second and first == "model":
            values["model"] = {**values.get("model", {}), second: value}
        else:
            values[key] = value
    known = {spec.name for spec in dataclasses.fields(Recipe)}
    unknown = sorted(map(str, values.keys() - known))
    _require(not unknown, "fields", ", ".join(unknown), ", ".join([*sorted(known), "model.FIELD"]))
    required = {spec.name for spec in dataclasses.fields(Recipe) if _is_required(spec)}
    missing = sorted(required - values.keys())
    _require(not missing, "fields", f"without {', '.join(missing)}", f"files that have {', '.join(sorted(required))}")
    return Recipe(**{"output": f"runs/{Path(name).name.removesuffix('.yaml')}", **values})


def _read(name: str, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    shipped = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    path = Path(name) if Path(name).is_file() else shipped
    names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    _require(path.is_file(), "RECIPE", name, f"a YAML file, or one of {names}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    _require(isinstance(values, dict), "RECIPE", path, "a YAML file of `key: value` lines")
    base = values.pop("extends", None)
    if base is None:
        return values
    _require(path not in extended_by, "extends", base, "a recipe that does not extend this one in turn")
    base = _read(base, (*extended_by, path))
    return {**base, **values, "model": {**base.get("model", {}), **values.get("model", {})}}


def _is_required(spec: dataclasses.Field) -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


def _typed(spec: dataclasses.Field, value: Any) -> Any:
    """The value in the field's type, where nothing is lost: `15e9` is an integer too."""
    kinds = getattr(spec.type, "__args__", (spec.type,))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if int in kinds and number and value == int(value):
        return int(value)
    if float in kinds and number:
        return float(value)
    allowed = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    _require(isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)), spec.name, value, allowed)
    return value


def _model_fields() -> set[str]:
    """The fields of our own and their aliases, without those that every Transformers configuration has."""
    return {*DeltaNetConfig.__annotations__, *DeltaNetConfig.attribute_map} - {"model_type"}


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        shown = value if isinstance(value, (str, Path)) else repr(value)
        raise ValueError(f"Recipe: `{name}` is {shown}; allowed: {allowed}.")
