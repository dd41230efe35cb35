"""Published checkpoints: their logits, from any cut; back again bit for bit; and what is refused."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from remanence.errors import CheckpointError, StateError, UnknownName
from remanence.learning import Learner
from remanence.models import pretrained
from remanence.optim.adamw import AdamW
from remanence.state import flatten, nbytes

COMMON = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": None}
QWEN = COMMON | {
    "hidden_size": 32,  # narrower heads' norms would magnify rounding beyond the tolerance, theirs and ours
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
GEMMA = COMMON | {
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "lru_width": 24,
    "intermediate_size": 48,
    "attention_window_size": 5,
}
MODELS = {
    "mamba": COMMON | {"state_size": 4},
    "mamba, biased": COMMON | {"state_size": 4, "use_bias": True, "use_conv_bias": False, "time_step_rank": 3},
    "falcon_mamba": COMMON | {"state_size": 4, "tie_word_embeddings": False},
    "mamba2": COMMON | {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "mamba2, biased": COMMON
    | {"state_size": 4, "num_heads": 8, "head_dim": 4, "n_groups": 1, "use_bias": True, "time_step_limit": (0.1, 0.9)},
    "rwkv": COMMON | {"rescale_every": 0},
    "rwkv, wide": COMMON | {"attention_hidden_size": 24, "intermediate_size": 20, "rescale_every": 1},
    "xlstm": COMMON | {"num_heads": 2, "num_blocks": 2},
    "xlstm, wide": COMMON | {"num_heads": 4, "num_blocks": 2, "qk_dim_factor": 1.0, "v_dim_factor": 0.5},
    "recurrent_gemma": GEMMA,
    "recurrent_gemma, shared keys": GEMMA | {"num_key_value_heads": 1, "attention_bias": True, "lru_width": None},
    "qwen3_next": QWEN,
    "qwen3_next, dense": QWEN | {"mlp_only_layers": [0], "decoder_sparse_step": 2, "attention_bias": True},
}


def theirs(case):
    """A model of the other library whose every weight matters."""
    import transformers

    torch.manual_seed(0)
    kind = case.split(",")[0]
    config = transformers.AutoConfig.for_model(kind, **MODELS[case])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.2 * torch.randn_like(p) + (p.mean() if p.ndim == 1 or "mix" in name else 0))
    return model


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    """A saved checkpoint: (folder, their model, ours)."""
    folder = tmp_path_factory.mktemp("theirs")
    model = theirs(request.param)
    model.save_pretrained(folder)
    return folder, model, pretrained.load(folder)


def tokens(count=100, rows=2):
    return torch.randint(0, 50, (rows, count), generator=torch.Generator().manual_seed(1))


def near(a, b, tolerance=1e-4):
    """Equal but for rounding, in shares of the largest number."""
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max() <= tolerance * max(1.0, b.double().abs().max())


@torch.no_grad()
def test_logits_are_theirs(both):
    _, model, ours = both
    want = model(tokens(), use_cache=False).logits
    assert want.std() > 0.1
    near(ours(tokens())[0], want)


@torch.no_grad()
def test_a_state_continued_by_any_number_of_tokens_gives_their_full_pass(both):
    _, model, ours = both
    want = model(tokens(), use_cache=False).logits
    state, pieces = None, []
    for piece in tokens().split([9, 1, 0, 70, 1, 1, 18], dim=1):
        logits, state = ours(piece, state)
        pieces.append(logits)
    near(torch.cat(pieces, dim=1), want)
    for name, whole in flatten(ours(tokens())[1]).items():
        near(flatten(state)[name], whole)


@torch.no_grad()
def test_saved_back_it_is_the_checkpoint_that_it_was(both, tmp_path):
    import transformers

    folder, model, ours = both
    pretrained.save(ours, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    again, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    near(again(tokens(), use_cache=False).logits, model(tokens(), use_cache=False).logits)


@pytest.fixture
def folder(tmp_path):
    """A small model of ours, saved."""
    config = {"model_type": "mamba", "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "bos_token_id": 7}
    pretrained.save(pretrained.from_config(config), tmp_path)
    return tmp_path


def altered(folder, alter):
    weights = load_file(folder / "model.safetensors")
    alter(weights)
    save_file(weights, folder / "model.safetensors")


def test_xlstm_with_fused_projections_is_the_same_model(tmp_path):
    """The other library cannot make such a model at random, but there are checkpoints of it."""
    config = {"model_type": "xlstm", "vocab_size": 20, "hidden_size": 8, "num_heads": 2, "num_blocks": 1}
    model = pretrained.from_config(config)
    pretrained.save(model, tmp_path)
    layer, mixer = "backbone.blocks.0.mlstm_layer.", "backbone.blocks.0.ffn."

    def fuse(w):
        def joined(prefix, names, part="weight"):
            return torch.cat([w.pop(f"{prefix}{n}.{part}") for n in names])

        w[f"{layer}qkv_opreact.weight"] = joined(layer, ("q", "k", "v", "ogate_preact"))
        for part in ("weight", "bias"):
            w[f"{layer}ifgate_preact.{part}"] = joined(layer, ("igate_preact", "fgate_preact"), part)
        w[f"{mixer}proj_up_gate_z.weight"] = joined(mixer, ("proj_up_gate", "proj_up"))

    altered(tmp_path, fuse)
    (tmp_path / "config.json").write_text(json.dumps(config | {"weight_mode": "fused"}))
    assert torch.equal(pretrained.load(tmp_path)(tokens() % 20)[0], model(tokens() % 20)[0])


def test_missing_extra_and_misshapen_tensors_are_named(folder):
    name = "backbone.layers.1.mixer.D"
    altered(folder, lambda w: w.update({name: w[name][:3].clone()}))
    with pytest.raises(CheckpointError, match=r"'backbone.layers.1.mixer.D' must be \[16\], got \[3\]"):
        pretrained.load(folder)
    altered(folder, lambda w: w.pop(name))
    with pytest.raises(CheckpointError, match=r"it has no 'backbone\.layers\.1\.mixer\.D'"):
        pretrained.load(folder)
    altered(folder, lambda w: w.update({"backbone.layers.2.norm.weight": torch.ones(8)}))
    with pytest.raises(CheckpointError, match=r"no 'backbone.*D'; it also has 'backbone.layers.2.norm.weight'"):
        pretrained.load(folder)


@pytest.mark.parametrize(
    "spelling", [{"rope_scaling": {"type": "yarn"}}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0}}]
)
def test_scaled_rotary_positions_are_refused(spelling):
    with pytest.raises(CheckpointError, match="rope_type = 'yarn'; only 'default'"):
        pretrained.from_config({"model_type": "recurrent_gemma"} | GEMMA | spelling)


def test_a_tied_head_may_be_stored_or_not(folder):
    model = pretrained.load(folder)
    altered(folder, lambda w: w.update({"lm_head.weight": w["backbone.embeddings.weight"].clone()}))
    again = pretrained.load(folder)
    assert again.head.weight is again.embedding.weight
    assert torch.equal(again.head.weight, model.head.weight)


def test_settings_that_we_lack_and_files_that_are_not_there_are_refused_in_a_sentence(folder, tmp_path):
    def says(**changes):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({n: v for n, v in (config | changes).items() if v is not None}))
        return pytest.raises((CheckpointError, UnknownName))

    with says(hidden_act="gelu") as error:
        pretrained.load(folder)
    assert "hidden_act = 'gelu'; only 'silu'" in str(error.value)
    with says(hidden_act="silu", hidden_size=None) as error:
        pretrained.load(folder)
    assert "does not say 'hidden_size', which a mamba model needs" in str(error.value)
    with says(model_type="manba") as error:
        pretrained.load(folder)
    assert "no architecture called 'manba'; did you mean 'mamba'" in str(error.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        pretrained.load(folder)
    with pytest.raises(CheckpointError, match=r"There is no config\.json in"):
        pretrained.load(tmp_path / "elsewhere")


def test_damaged_and_absent_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        pretrained.load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors in"):
        pretrained.load(folder)


def test_weights_in_several_files_and_their_precisions(folder):
    model = pretrained.load(folder)
    weights = load_file(folder / "model.safetensors")
    halves = {n: (w if n.endswith("A_log") else w.bfloat16()) for n, w in weights.items()}
    names, parts = sorted(halves), ("a.safetensors", "b.safetensors")
    (folder / "model.safetensors").unlink()
    for at, part in enumerate(parts):
        save_file({n: halves[n] for n in names[at::2]}, folder / part)
    places = {n: parts[i % 2] for i, n in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    loaded = pretrained.load(folder)
    assert loaded.embedding.weight.dtype == torch.bfloat16
    assert loaded.layers[0].inner.A_log.dtype == torch.float32
    near(pretrained.load(folder, dtype=torch.float32)(tokens() % 20)[0], model(tokens() % 20)[0], 0.1)
    pretrained.save(model, folder)
    assert torch.equal(pretrained.load(folder)(tokens() % 20)[0], model(tokens() % 20)[0])


def test_a_state_of_another_model_is_refused(folder):
    model = pretrained.load(folder)
    _, state = model(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(StateError, match="belongs to another model"):
        model(torch.zeros(1, 1, dtype=torch.long), {"0": state["0"]})
    with pytest.raises(StateError, match="another width or batch"):
        model(torch.zeros(2, 1, dtype=torch.long), state)


def test_it_learns_from_a_stream_and_its_state_stays_as_large(folder):
    model = copy.deepcopy(pretrained.load(folder))
    assert model.head.weight is model.embedding.weight
    learner = Learner(model, AdamW(model.parameters(), lr=0.01))
    text = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6] * 40])
    costs = [learner.observe(piece).bits.mean().item() for piece in text.split(16, dim=1)]
    assert costs[-1] < 0.5 * costs[0]
    assert learner.state_bytes == nbytes(model.initial_state(1))


def test_loading_needs_no_other_library(folder):
    code = (
        "import sys; from remanence.models import pretrained; m = pretrained.load(sys.argv[1]);"
        "pretrained.save(m, sys.argv[1]); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)
