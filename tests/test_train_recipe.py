"""Recipes: the paper's numbers, files and flags, and what is refused."""

import dataclasses

import pytest
import torch
import yaml

from deltanet import DeltaNetForCausalLM
from deltanet.train.recipe import RECIPES, Recipe, load_recipe


class TestRecipes:
    @pytest.mark.parametrize(
        ("name", "parameters", "steps", "warmup", "rate", "batch"),
        [("340m-15b", None, 28610, 953, 3e-4, 2**19), ("1.3b-100b", 1_365_677_056, 47683, 476, 3e-4, 2**21)],
    )
    def test_numbers_of_the_paper(self, name, parameters, steps, warmup, rate, batch):
        recipe = load_recipe(name, {})
        assert (recipe.steps, recipe.warmup_steps, recipe.batch_tokens) == (steps, warmup, batch)
        rates = (recipe.learning_rate, recipe.initial_learning_rate, recipe.final_learning_rate)
        assert rates == pytest.approx((rate, rate / 10, rate / 10))
        assert (recipe.weight_decay, recipe.max_grad_norm, recipe.block_length, recipe.packing) == (0.01, 1.0, 2048, False)
        config = recipe.config(vocab_size=32000)
        assert config.hidden_size // config.num_heads == 128 and config.conv_size == 4
        if parameters:
            with torch.device("meta"):
                assert DeltaNetForCausalLM(config).num_parameters() == parameters
        kinds = {"sliding": "sliding_attention", "global": "full_attention"}
        layers = {"sliding": list(range(1, 24, 2)), "global": [1, 12]}
        for suffix, kind in kinds.items():
            types = load_recipe(f"{name}-{suffix}", {}).config().layer_types
            assert [i for i, found in enumerate(types) if found == kind] == layers[suffix]
        hybrid = load_recipe(f"{name}-sliding", {})
        assert dataclasses.replace(hybrid, hybrid=None, output=recipe.output) == recipe

    @pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
    def test_written_and_read_again(self, path, tmp_path):
        recipe = load_recipe(path.stem, {})
        assert recipe.output == f"runs/{path.stem}"
        recipe.write(tmp_path / "resolved.yaml")
        assert load_recipe(str(tmp_path / "resolved.yaml"), {}) == recipe
        assert set(yaml.safe_load((tmp_path / "resolved.yaml").read_text())) == {f.name for f in dataclasses.fields(Recipe)}

    def test_what_the_paper_does_not_state_is_marked(self):
        marked = [
            line.split(":")[0].strip() for line in (RECIPES / "340m-15b.yaml").read_text().splitlines() if "# ours" in line
        ]
        assert {"initializer_range", "betas", "epsilon", "precision"} <= set(marked)
        assert "window: 2048  # ours" in (RECIPES / "340m-15b-sliding.yaml").read_text()

    def test_flags_override_the_file(self):
        flags = {
            "tokens": "2e9",
            "learning_rate": "1e-3",
            "model.hidden_size": "512",
            "hybrid": "global_attention",
            "seed": "7",
        }
        recipe = load_recipe("340m-15b", flags)
        assert (recipe.tokens, recipe.learning_rate, recipe.seed) == (2_000_000_000, 1e-3, 7)
        assert recipe.model == {**load_recipe("340m-15b", {}).model, "hidden_size": 512}
        assert recipe.config().layer_types.count("full_attention") == 2

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"learnin_rate": "1"}, "`fields` is learnin_rate; allowed: batch_tokens, betas, .*model.FIELD"),
            ({"model.hiden_size": "1"}, "`model` is hiden_size; allowed: fields of DeltaNetConfig: .*hidden_size"),
            ({"model.num_heads": "7"}, "DeltaNetConfig: `expand_k`"),
            ({"model.hidden_size": "wide"}, "`model` is not allowed.*'hidden_size'"),
            ({"seed": "1.5"}, "`seed` is 1.5; allowed: int"),
            ({"packing": "1"}, "`packing` is 1; allowed: bool"),
            ({"log_every": "true"}, "`log_every` is True; allowed: int"),
            ({"learning_rate": "fast"}, "`learning_rate` is fast; allowed: float"),
            ({"learning_rate": "0"}, "allowed: 0 to `learning_rate` = 0.0"),
            ({"hybrid": "half"}, "`hybrid` is half; allowed: null, sliding_window, global_attention"),
            ({"precision": "int8"}, "`precision` is int8; allowed: float32, bfloat16"),
            ({"batch_tokens": "100000"}, "multiples of `device_batch` x `block_length` = 32 x 2048 = 65536"),
            ({"save_every": "15"}, "`save_every` is 15; allowed: multiples of `log_every` = 10"),
            ({"tokens": "1000", "warmup_tokens": "0"}, "`tokens` is 1000; allowed: `batch_tokens` = 524288 and more"),
            ({"warmup_tokens": "15e9"}, "`warmup_tokens` is 15000000000; allowed"),
            ({"betas": "[0.9, x]"}, "`betas` is .*; allowed: two numbers"),
            ({"pretrained": "somewhere"}, "`pretrained` is somewhere; allowed: null where `model` or `hybrid`"),
            ({"keep_checkpoints": "0"}, "`keep_checkpoints` is 0; allowed: 1 and more"),
        ],
    )
    def test_refused_values(self, flags, message):
        with pytest.raises(ValueError, match=message):
            load_recipe("340m-15b", flags)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("tokens: [", "is no YAML"),
            ("- 1", "allowed: a YAML file of `key: value` lines"),
            ("tokens: 5", "`fields` is without batch_tokens, data, learning_rate; allowed"),
            ("extends: bad.yaml", "`extends` is bad.yaml; allowed: a recipe that does not extend this one in turn"),
            ("extends: nowhere", "`RECIPE` is nowhere; allowed: a YAML file, or one of 1.3b-100b"),
        ],
    )
    def test_refused_files(self, tmp_path, monkeypatch, text, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe("bad.yaml", {})
