"""Exports load in transformers alone, in a process that cannot import us, and compute what our models do."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy_gpt
import pytest

from gpt_core.formats import open_checkpoint
from gpt_core.text.gpt2 import gpt2_tokenizer
from parity.checkpoints.convert import convert

PROMPT, NEW = 11, 32  # more than ten windows in all
HELD_BY_NONE = ("irregular-pattern", "learned-pattern", "scaled-window")
HELD = {name: config for name, config in numpy_gpt.CONFIGS.items() if name not in HELD_BY_NONE}
ROOM = {name: replace(config, context_length=96) for name, config in HELD.items()}
ROOM |= {name: replace(ROOM[name], head_dim=6, attention_scale=None) for name in ("gpt-neox", "olmoe")}
# Rows of a kernel of whole 16 bytes: transformers' grouped products of experts take no others.
ROOM |= {name: replace(ROOM[name], expert_dim=16) for name in ("mixtral", "olmoe")}
# A head that is the embedding, which these scale up, says the last token again.
ROOM |= {name: replace(ROOM[name], tied_embeddings=False) for name in ("gemma-2", "gemma-3", "granite")}
NO_QKV_BIAS = {
    f"{name}, no q/k/v biases": replace(config, qkv_bias=False)
    for name, config in ROOM.items()
    if name in numpy_gpt.VARIANTS and config.position == "learned" and config.sliding_window is not None
}
LOCAL = NO_QKV_BIAS["learned-mha-window, no q/k/v biases"]
HEADS_OF_THEIR_OWN = {
    "head_dim 10": replace(ROOM["learned-mqa-full"], embed_dim=60, head_dim=10, attention_scale=None),
    "head_dim 12, window": replace(
        NO_QKV_BIAS["learned-mha-window, no q/k/v biases"], embed_dim=72, head_dim=12, attention_scale=None
    ),
    "head_dim 10, rotary": replace(ROOM["rope-gqa-window"], embed_dim=60, head_dim=10, attention_scale=None),
    "attention_scale 1": replace(LOCAL, attention_scale=1.0),
}
CONFIGS = ROOM | NO_QKV_BIAS | HEADS_OF_THEIR_OWN
NATIVE = {
    name: config for name, config in CONFIGS.items() if not ("learned" in name and "window" in name)
} | NO_QKV_BIAS
REMOTE = {name: config for name, config in CONFIGS.items() if name not in NATIVE}

# Runs in an interpreter of its own, in which none of our packages can be imported.
PROGRAM = """
import json, sys
import numpy as np

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("gpt_core", "jax_gpt", "torch_gpt", "parity", "jax", "flax"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import torch, transformers
from transformers import AutoModelForCausalLM

transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)
folders, out = json.loads(sys.argv[1]), sys.argv[2]
tokens = torch.tensor(np.load(sys.argv[3]))
found = {}
for name, (folder, trust) in folders.items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
    with torch.no_grad():
        found[f"{name}/logits"] = model(tokens).logits.numpy()
        generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, eos_token_id=None,
                                   max_new_tokens=int(sys.argv[4]), pad_token_id=0)
    found[f"{name}/tokens"] = generated[:, tokens.shape[1]:].numpy()
    found[f"{name}/class"] = np.array(type(model).__name__)
    found[f"{name}/dtype"] = np.array(str(model.dtype))
assert not any(name.partition(".")[0] in ("gpt_core", "torch_gpt", "parity") for name in sys.modules)
np.savez(out, **found)
"""


def slug(name):
    return name.replace("/", "").replace(",", "").replace(" ", "-")


def weights_of(name, config=None):
    config = config or CONFIGS[name]
    # With another seed these two say one and the same token all the time.
    seed = 7 if name in ("rope-mqa-window", "unpadded") else 0
    return {row: array.astype(np.float32) for row, array in numpy_gpt.random_weights(config, seed).items()}


@pytest.fixture(scope="module")
def prompt():
    return np.random.default_rng(2).integers(0, 29, (2, PROMPT))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Name -> what converting it said; the folders lie under the fixture's root by name."""
    from gpt_core.formats import format_of
    from gpt_core.storage.weights import weights_source

    root = tmp_path_factory.mktemp("exports")
    done = {}
    for name, config in CONFIGS.items():
        source, weights = root / f"{slug(name)}-ours", weights_of(name)
        source.mkdir()
        stored = {row: array.dtype for row, array in weights.items()}
        format_of("jax").write(source, config, weights_source(weights), stored, None)
        done[name] = convert(source, root / slug(name), "hf", allow_remote_code=True)
    return done


@pytest.fixture(scope="module")
def loaded(exports, prompt, tmp_path_factory):
    """What transformers alone makes of all exports, in one process."""
    folder = tmp_path_factory.mktemp("loaded")
    np.save(folder / "tokens.npy", prompt)
    folders = {slug(name): (done.destination, name in REMOTE) for name, done in exports.items()}
    arguments = (json.dumps(folders), folder / "found.npz", folder / "tokens.npy", NEW)
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return dict(np.load(folder / "found.npz"))


def torch_logits(name):
    from gpt_core.storage.weights import weights_source
    from parity.sides import torch_side

    return torch_side.logits_function(torch_side.build(CONFIGS[name], weights_source(weights_of(name)), "float32"))


def rms(error):
    return float(np.sqrt(np.mean(np.square(error))))


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_definition_of_the_model(name, loaded, prompt):
    """Against the NumPy model in fp64, on the weights before they were converted; and we are no farther from it."""
    config = CONFIGS[name]
    exact = {row: array.astype(np.float64) for row, array in weights_of(name).items()}
    truth = numpy_gpt.forward(config, exact, prompt)["logits"]
    theirs, ours = loaded[f"{slug(name)}/logits"], torch_logits(name)(prompt)
    assert theirs.shape == truth.shape, "the padded vocabulary is cut"
    assert numpy_gpt.relative_error(theirs, truth) < 5e-6
    assert rms(ours - truth) <= 3 * rms(theirs - truth)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_generates_the_tokens_of_our_reference_decoding(name, loaded, prompt):
    """Each of their tokens is our likeliest behind those before it: then the first that differs cannot be."""
    theirs = loaded[f"{slug(name)}/tokens"]
    ours = torch_logits(name)(np.concatenate([prompt, theirs], axis=1))[:, PROMPT - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (len(prompt), NEW)
    assert len(np.unique(ours)) > 3, "such a text would be alike whatever the window"


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_export_needs_no_code(name, exports):
    folder = Path(exports[name].destination)
    assert not list(folder.glob("*.py"))
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", REMOTE)
def test_an_export_with_its_own_code_says_why(name, exports, loaded):
    assert exports[name].destination_format == "hf-twingpt"
    assert "no native architecture expresses it" in exports[name].reason
    assert str(loaded[f"{slug(name)}/class"]) == "TwinGPTForCausalLM"
    assert (Path(exports[name].destination) / "modeling_twingpt.py").is_file()


@pytest.mark.parametrize(
    ("name", "format", "class_name"),
    [
        ("learned-mha-full", "hf-gpt2", "GPT2LMHeadModel"),
        ("learned-gqa-full", "hf-gpt2", "GPT2LMHeadModel"),
        ("learned-mqa-full", "hf-gpt_bigcode", "GPTBigCodeForCausalLM"),
        ("learned-gqa-window, no q/k/v biases", "hf-gpt_neo", "GPTNeoForCausalLM"),
        *(
            (f"rope-{heads}-{mask}", "hf-starcoder2", "Starcoder2ForCausalLM")
            for heads in ("mha", "gqa", "mqa")
            for mask in ("full", "window")
        ),
        ("mixtral", "hf-mixtral", "MixtralForCausalLM"),
        ("olmoe", "hf-olmoe", "OlmoeForCausalLM"),
    ],
)
def test_hf_picks_the_native_class(name, format, class_name, exports, loaded):
    assert exports[name].destination_format == format
    assert exports[name].reason
    assert str(loaded[f"{slug(name)}/class"]) == class_name
    assert str(loaded[f"{slug(name)}/dtype"]) == "torch.float32"


def test_a_scale_of_one_is_kept_bit_for_bit_and_another_rounds_with_a_notice(exports):
    assert not any("attention_scale" in notice for notice in exports["attention_scale 1"].notices)
    folded = exports["learned-mha-window, no q/k/v biases"].notices
    assert any("attention_scale" in notice and "exact" in notice for notice in folded), "head_dim 4: a power of two"
    rounded = exports["head_dim 12, window"].notices
    assert any("attention_scale" in notice and "rounded once" in notice for notice in rounded)


def test_repeated_heads_and_a_cut_vocabulary_are_said(exports):
    notices = exports["learned-gqa-full"].notices
    assert any("written 3 times" in notice for notice in notices)
    assert any("3 rows that pad the vocabulary are cut" in notice for notice in notices)


def with_tokenizer(name, root, **options):
    """An exported folder with GPT-2's tokenizer, and the config of its model."""
    from gpt_core.formats import format_of
    from gpt_core.storage.weights import weights_source

    small = {"embed_dim": 12, "n_heads": 2, "n_kv_heads": 1 if "mqa" in name else 2, "head_dim": 6, "mlp_dim": 48}
    config = replace(ROOM[name], vocab_size=50257, n_layers=1, **small)
    weights = weights_of("served", config)
    (root / "ours").mkdir()
    stored = {row: array.dtype for row, array in weights.items()}
    format_of("torch").write(root / "ours", config, weights_source(weights), stored, gpt2_tokenizer())
    convert(root / "ours", root / "export", "hf", **options)
    return root / "export", config


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder in shards."""
    more = {"max_shard_size": 1_000_000, "parity": "passed: 342 of 342 checks"}
    return with_tokenizer("learned-mqa-full", tmp_path_factory.mktemp("served"), **more)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder of the architecture whose tokenizer transformers knows without any rules beside it."""
    return with_tokenizer("learned-mha-full", tmp_path_factory.mktemp("gpt2"))[0]


class TestFolder:
    def test_config_has_what_older_readers_need(self, served, exports):
        content = json.loads((served[0] / "config.json").read_text())
        assert content["n_ctx"] == content["n_positions"] == 96
        assert content["torch_dtype"] == content["dtype"] == "float32"
        assert content["bos_token_id"] == content["eos_token_id"] == 50256
        rotary = json.loads((Path(exports["rope-mqa-window"].destination) / "config.json").read_text())
        assert rotary["rope_theta"] == rotary["rope_parameters"]["rope_theta"] == 10_000.0
        assert rotary["sliding_window"] == 4

    def test_shards_have_an_index_and_metadata_and_a_tied_head_lies_once(self, served):
        from safetensors import safe_open

        index = json.loads((served[0] / "model.safetensors.index.json").read_text())
        files = sorted(served[0].glob("model-*.safetensors"))
        assert len(files) > 1
        keys = {}
        for file in files:
            with safe_open(str(file), "np") as opened:
                assert opened.metadata()["format"] == "pt"
                keys |= dict.fromkeys(opened.keys(), file.name)
        assert keys == index["weight_map"]
        assert "lm_head.weight" not in keys
        assert not (served[0] / "model.safetensors").exists()
        assert index["metadata"]["total_size"] == 4 * sum(
            open_checkpoint(served[0]).tensors[k].nbytes // 4 for k in keys
        )

    def test_the_tokenizer_loads_offline_and_is_gpt2s(self, served):
        from transformers import AutoTokenizer

        text = "Hello  world, naïve 你好 \n\n\tdef f(x):\n    return x<|endoftext|>!"
        tokenizer = AutoTokenizer.from_pretrained(served[0], local_files_only=True)
        assert len(tokenizer) == 50257
        assert tokenizer.eos_token_id == 50256
        plain = text.replace("<|endoftext|>", "")
        assert tokenizer(plain)["input_ids"] == gpt2_tokenizer().encode(plain)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert tokenizer.model_max_length == 96

    def test_generation_config_is_greedy_and_ends_at_the_end_of_text(self, served):
        content = json.loads((served[0] / "generation_config.json").read_text())
        assert content["do_sample"] is False
        assert content["eos_token_id"] == 50256

    def test_the_card_names_variant_parity_and_hash(self, served):
        from gpt_core.checkpoints.hashing import hash_weights

        card = (served[0] / "README.md").read_text()
        assert "learned-mqa-full" in card
        assert "GPTBigCodeForCausalLM" in card
        assert "passed: 342 of 342 checks" in card
        assert hash_weights(open_checkpoint(served[0])) in card

    def test_the_tokenizer_comes_back(self, served, tmp_path):
        convert(served[0], tmp_path / "back", "torch")
        assert open_checkpoint(tmp_path / "back").tokenizer is not None

    def test_a_foreign_tokenizer_goes_along_to_another_hugging_face_folder(self, served, tmp_path):
        import shutil

        foreign = tmp_path / "foreign"
        shutil.copytree(served[0], foreign)
        for name in ("vocab.json", "merges.txt"):
            (foreign / name).unlink()
        changed = (foreign / "tokenizer.json").read_text().replace('"Hello"', '"Hallo"', 1)
        (foreign / "tokenizer.json").write_text(changed)
        convert(foreign, tmp_path / "lost", "torch")
        assert open_checkpoint(tmp_path / "lost").tokenizer is None
        convert(foreign, tmp_path / "kept", "hf", dtype="bfloat16")
        assert (tmp_path / "kept" / "tokenizer.json").read_text() == changed


OWN = {
    "vocab.json": lambda content: json.dumps(json.loads(content), indent=1, sort_keys=True).encode(),
    "merges.txt": lambda content: content.replace(b"\n", b"\r\n"),
}
PREFIX = {
    "tokenizer.json": lambda content: content.replace(b'"add_prefix_space": false', b'"add_prefix_space": true', 1)
}
ADDED = {
    "added_tokens.json": json.dumps({"[PAD]": 50257, "<user>": 50258}),
    "special_tokens_map.json": json.dumps({"pad_token": "[PAD]", "additional_special_tokens": ["<user>"]}),
    "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer", "pad_token": "[PAD]"}),
    "chat_template.jinja": "{{ messages }}",
}


class TestTokenizer:
    """What serves a folder goes on from format to format in every byte, and nothing else is put in its place."""

    @pytest.fixture(
        params=[
            ("gpt2", ["vocab.json", "merges.txt"], {}),
            ("gpt2", ["vocab.json", "merges.txt"], OWN),
            ("gpt2", ["tokenizer.json", "tokenizer_config.json"], {}),
            ("other", ["tokenizer.json", "tokenizer_config.json"], PREFIX),
            ("other", ["vocab.json", "merges.txt"], ADDED),
            (None, [], {}),
        ],
        ids=["original", "other bytes", "tokenizer.json", "prefix space", "added tokens", "none"],
    )
    def source(self, request, gpt2, tmp_path):
        """A folder of transformers with some of the files, changed or with others beside them."""
        import shutil

        kind, names, changes = request.param
        folder = tmp_path / "source"
        rest = shutil.ignore_patterns("README.md", "*token*", "vocab.json", "merges.txt")
        shutil.copytree(gpt2, folder, ignore=rest)
        for name in {*names, *changes}:
            change = changes.get(name, lambda content: content)
            content = change((gpt2 / name).read_bytes()) if callable(change) else change.encode()
            (folder / name).write_bytes(content)
        generation = {"bos_token_id": 50256, "eos_token_id": [50256, 13], "pad_token_id": 7, "temperature": 0.7}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder, kind

    @staticmethod
    def files(folder):
        from gpt_core.text.tokenizer_rules import TOKENIZER_FILES

        names = [*TOKENIZER_FILES, "generation_config.json"]
        return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}

    def test_a_chain_of_formats_gives_every_file_back(self, source, tmp_path, parity):
        folder, kind = source
        wanted = self.files(folder)
        steps = [folder, tmp_path / "jax", tmp_path / "torch", tmp_path / "hf"]
        for before, after in itertools.pairwise(steps):
            notices = convert(before, after, after.name).notices
            unread = kind == "other" and not (before / "tokenizer.json").is_file()
            assert any("its tokenizer is not GPT-2's" in notice for notice in notices) == unread
            found = self.files(after)
            assert found | wanted == found, "as they were, and others where they were missing"
            if kind != "gpt2":
                assert found == wanted
            assert (open_checkpoint(after).tokenizer is not None) == (kind == "gpt2")
        content = json.loads((steps[-1] / "config.json").read_text())
        assert (content["eos_token_id"], content["pad_token_id"]) == ([50256, 13], 7)
        assert json.loads(parity("inspect", steps[1], "--json").out)["tokenizer"] == kind

    def test_transformers_reads_the_ids_of_the_source(self, source, tmp_path):
        from transformers import AutoTokenizer

        folder, kind = source
        convert(folder, tmp_path / "again", "hf")
        if kind is None:
            return
        texts = ["Hello  World 1234\n", " <user>hi", "naïve<|endoftext|>"]
        found = [
            [AutoTokenizer.from_pretrained(place)(text)["input_ids"] for text in texts]
            for place in (folder, tmp_path / "again")
        ]
        assert found[0] == found[1]

    def test_token_ids_that_stand_in_config_json_alone_are_kept(self, source, tmp_path):
        folder, _ = source
        (folder / "generation_config.json").unlink()
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"eos_token_id": 5, "pad_token_id": 6}))
        convert(folder, tmp_path / "jax", "jax")
        convert(tmp_path / "jax", tmp_path / "hf", "hf")
        for name in ("config.json", "generation_config.json"):
            found = json.loads((tmp_path / "hf" / name).read_text())
            assert (found["eos_token_id"], found["pad_token_id"]) == (5, 6)

    @pytest.mark.parametrize("source", [("other", ["vocab.json", "merges.txt"], ADDED)], indirect=True)
    def test_text_is_refused_where_the_tokenizer_is_another(self, source, tmp_path, parity):
        folder, _ = source
        convert(folder, tmp_path / "torch", "torch")
        told = r"its tokenizer is not GPT-2's \(tokenizer_config.json differs in pad_token\), .*--tokens FILE\.npy"
        record = ("record", "--framework", "torch", tmp_path / "torch", tmp_path / "x.npz")
        for words in (("verify", folder), ("check", tmp_path / "torch", tmp_path / "torch"), record):
            called = parity(*words)
            assert called.code == 2
            assert re.search(told, called.err)


def test_the_card_of_a_run_names_the_run(tmp_path, exports):
    """The step of a training run: its record is read, whoever wrote the weights."""
    import shutil

    from gpt_core.runs.config import RunConfig
    from gpt_core.runs.folder import open_run
    from gpt_core.runs.saved import RECORD_FILE, StepRecord

    config = CONFIGS["rope-gqa-full"]
    run = tmp_path / "my-run"
    open_run(run, RunConfig.from_dict({"model": config.to_dict(), "data": {"source": "stdlib"}}), "jax", None)
    step = run / "checkpoints" / "30"
    shutil.copytree(Path(exports["rope-gqa-full"].source), step)
    (step / "config.json").unlink()
    record = StepRecord(30, 1228, {}, 7, 0, 4.25, "jax", {})
    (step / RECORD_FILE).parent.mkdir(parents=True)
    (step / RECORD_FILE).write_text(json.dumps(record.to_dict()))
    convert(step, tmp_path / "export", "hf")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "`my-run` at step 30" in card
    assert "1,228 tokens" in card
    assert "validation loss 4.2500" in card
