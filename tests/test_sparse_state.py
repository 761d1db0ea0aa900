"""What a checkpoint keeps of a sparse phase: a versioned table of values, and layers by name; an older one resumes."""

import json
import tarfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT

from configs.errors import ConfigError
from configs.loader import load_config
from models.llama import Llama
from recipes.check import check_config
from recipes.sparsity import Sparsity


def test_a_sparse_phase_of_an_older_release_resumes_exactly(tmp_path, train):
    """A checkpoint of commit c93bbb7 at step 6 of a sparse phase, with the losses that it went on to there."""
    run, corpus = tmp_path / "run", tmp_path / "corpus"
    with tarfile.open(ROOT / "tests/data/sparse_phase_of_c93bbb7.tar.xz") as archive:
        archive.extractall(run)
    about = run / "run.json"
    about.write_text(about.read_text().replace("RUN", str(tmp_path)))
    corpus.mkdir()
    for index in range(40):
        lines = [f"def f{index}_{line}(x):\n    return x * {line * index % 97} + {line}\n" for line in range(12)]
        (corpus / f"{index:03}.py").write_text("\n".join(lines))
    keys = {
        "data.sources": f'[{{type = "text", path = "{corpus}/*.py"}}]',
        "tokenizer.cache_folder": str(tmp_path / "tok"),
        "tokenizer.vocab_size": "300",
        "model.dim": "16",
        "model.hidden_dim": "64",
        "activations.v": "32",
        "router.cluster_size": "16",
        "training.steps": "10",
        "validation.freq": "5",
        "validation.sequences": "2",
        "checkpoint.interval": "1",
        "checkpoint.keep_latest_k": "2",
    }
    expected = json.loads((run / "losses.json").read_bytes())
    resumed = train(run, *(word for key, value in keys.items() for word in (f"--{key}", value)))
    assert {str(step): row["loss"] for step, row in resumed.items()} == expected
    state = dcp.FileSystemReader(run / "checkpoint" / "step-10").read_metadata().state_dict_metadata
    assert {"sparsity.prepared", "sparsity.layers.0.feed_forward.centroids"} < set(state)


def test_what_a_phase_was_prepared_for_is_a_table_of_values():
    config, _ = load_config(["--config", "configs/debug.toml", "--recipe", "recipes/venom_2of16.toml"])
    args, spans = check_config(config)
    args.vocab_size = 64
    sparsity = Sparsity(config, Llama(args).feed_forwards(), [], spans)
    sparsity.prepared = sparsity._wanted(spans[1])
    state = sparsity.state_dict()
    table = json.loads(state["prepared"])
    assert table == {
        "version": 2,
        "start": spans[1].start,
        "schedule.dense_layers": 0,
        "weights.pattern": "2:4",
        "router.enable": True,
        "router.cluster_size": 64,
        "router.cluster_by": "activations",
        "router.token_clusters": 0,
        "router.spread": True,
    }
    sparsity.load_state_dict(state)
    assert sparsity.state_dict()["prepared"] == state["prepared"]  # checkpoints of a resumed run are equal to the byte
    del table["router.token_clusters"]  # a checkpoint from before the key
    sparsity.load_state_dict(state | {"prepared": json.dumps(table)})
    assert sparsity.state_dict()["prepared"] == state["prepared"]
    config.activations.keep = 0.5  # no key that preparation depends on
    sparsity.load_state_dict(state)
    assert not sparsity.prepares(spans[1].start + 2)
    config.router.spread = False
    assert sparsity.prepares(spans[1].start + 2)
    # A checkpoint of the first version that does not fit is not loaded, and the next one is of this version.
    router = "Router(enable=True, cluster_size={}, cluster_by='activations', spread=True)"
    for size, fits in ((64, True), (32, False)):
        assert sparsity.expect(f"40 0 Weights(pattern='2:4') {router.format(size)}") == fits
        assert ("0.centroids" in sparsity.state_dict()) == fits
    with pytest.raises(ConfigError, match=r"of a later release .*resume it with that release"):
        sparsity.load_state_dict(state | {"prepared": json.dumps(table | {"version": 3})})


@pytest.mark.parametrize("clusters", [(), ("--router.token_clusters", "8")])
def test_many_experts_on_many_ranks_are_clustered_by_a_token_each_at_least(clusters, monkeypatch):
    monkeypatch.setattr("recipes.sparsity.EXPERTS_SAMPLE", 3)  # as 16384 are for 64 experts on 512 ranks
    words = ["--config", "configs/moe_debug.toml", "--recipe", "recipes/groups_quarter.toml", *clusters]
    config, _ = load_config(words)
    args, spans = check_config(config)
    args.vocab_size = 64
    model = Llama(args)
    with torch.no_grad():
        model.init_weights()
    sparsity = Sparsity(config, model.feed_forwards(), [], spans)
    assert sparsity.enter(spans[1].start + 1, lambda: model(torch.zeros(1, 128, dtype=torch.int64)))
    for experts in sparsity.feed_forwards[args.dense_layers :]:
        norms = experts.centroids.norm(dim=1)
        if clusters:  # one token: experts that it does not go to have none to cluster
            assert norms.max() > 0.9 and ((norms == 0) | (norms > 0.9)).all()
        else:
            assert norms.min() > 0.9
