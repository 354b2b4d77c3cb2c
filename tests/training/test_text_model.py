import pytest
import torch
from torch import nn

from dynaconv.data.text import encode, index_of, pad_texts
from dynaconv.registry import family, names
from dynaconv.training import text_model
from dynaconv.training.model import dynamic_layers
from dynaconv.training.text_model import (
    HEADS,
    UNKNOWN_SHARE,
    Block,
    TextConfig,
    TextNet,
    build_text,
    chunks,
    label,
    logits,
    resized,
)

# Those that stand in for a depthwise convolution, not for one that enlarges.
ONE_D = [
    name
    for name in names()
    if 1 in family(name).classes
    and family(name).classes[1].static[1] is nn.Conv1d
    and name != "contmix"
]
TEXTS = ["a", "a short one", "a longer text that goes on, and on, and then ends", "bad", "ça, 漢"]
CHARACTERS = "".join(sorted(set("".join(TEXTS[:-1]))))
SIZES = {"channels": 16, "blocks": 2, "kernel": 5}


def config_of(layer, **changes):
    named = {"labels": ["x", "y", "z"], "characters": CHARACTERS}
    return TextConfig(layer=layer, **SIZES, **named, **changes)


def trained(layer):
    """A model whose every part has moved away from its start, batch statistics included."""
    config = config_of(layer)
    model = build_text(config).train()
    tokens, mask = pad_texts([encode(text, index_of(CHARACTERS)) for text in TEXTS])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(tokens, mask), torch.tensor([0, 1, 2, 0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), config


@pytest.mark.parametrize("layer", ["static", *ONE_D])
def test_a_text_says_the_same_alone_and_in_any_padded_batch(layer):
    model, config = trained(layer)
    tokens = [encode(text, index_of(CHARACTERS)) for text in TEXTS]
    with torch.no_grad():
        alone = torch.cat([model(one[None]) for one in tokens])
        assert (alone.std(0) > 1e-3).all()  # the texts do differ
        for order in ([0, 1, 2, 3, 4], [3, 0], [2, 4, 1]):
            together = model(*pad_texts([tokens[i] for i in order]))
            torch.testing.assert_close(together, alone[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model, config, TEXTS), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", ["static", *ONE_D])
def test_what_lies_in_the_padding_does_not_matter(layer):
    model, _ = trained(layer)
    tokens, mask = pad_texts([encode(text, index_of(CHARACTERS)) for text in TEXTS])
    with torch.no_grad():
        other = model(tokens.masked_fill(~mask, 3), mask)
        torch.testing.assert_close(model(tokens, mask), other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", ONE_D)
def test_every_family_starts_from_the_same_static_network(layer):
    static, dynamic = build_text(config_of("static")), build_text(config_of(layer))
    assert list(dynamic_layers(dynamic)) == ["blocks.0.mixer.conv", "blocks.1.mixer.conv"]
    state = dict(dynamic.named_parameters())
    kept = {n: p for n, p in static.named_parameters() if ".conv." not in n}
    assert len(kept) > 10
    assert all(torch.equal(p, state[n]) for n, p in kept.items())


@pytest.mark.parametrize("layer", ["lightconv", "dynamic_lightconv"])
def test_light_convolutions_have_heads_and_a_softmax(layer):
    for changes, heads in (({}, HEADS), ({"options": {"heads": 4}}, 4)):
        for conv in dynamic_layers(build_text(config_of(layer, **changes))).values():
            assert conv.heads == heads
            assert conv.weight_softmax


def test_build_depends_on_the_seed_alone_and_leaves_the_random_numbers():
    state = torch.get_rng_state()
    first, again, other = (build_text(config_of("dyconv", seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"channels": 0}, "channels=0 must be at least 1"),
        ({"blocks": 0}, "blocks=0"),
        ({"kernel": 4}, "kernel=4 has no middle"),
    ],
)
def test_numbers_that_make_no_model(change, text):
    with pytest.raises(ValueError, match=text):
        build_text(TextConfig(**{"labels": ["x", "y"]} | change))


def test_heads_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="heads=8 does not divide 12"):
        build_text(TextConfig(layer="lightconv", labels=["x", "y"], channels=12))


def test_a_block_adds_to_its_input():
    block = Block(8, 3).eval()
    nn.init.zeros_(block.mixer.mix.weight)
    nn.init.zeros_(block.mixer.mix.bias)
    x, mask = torch.randn(2, 8, 5), torch.ones(2, 5, dtype=torch.bool)
    output, kept = block.masked_forward(x, mask)
    assert torch.equal(output, x)
    assert torch.equal(kept, mask)


def test_the_shortcut_follows_a_layer_that_changes_the_length():
    x = torch.arange(8.0).expand(2, 3, 8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 4:] = False
    kept = mask[:, ::2]
    output = resized(x, mask, kept)
    assert output[0, 0].tolist() == [0.5, 2.5, 4.5, 6.5]
    assert output[1, 0].tolist() == [0.5, 2.5, 0, 0]
    assert resized(x, mask, mask) is x


@pytest.mark.parametrize("stride", [1.5, 2.7])
def test_a_learned_stride_keeps_the_promise(stride):
    model, _ = trained("learned_stride")
    with torch.no_grad():
        for layer in dynamic_layers(model).values():
            for parameter in layer.parameters():
                if parameter.numel() == 1 and parameter.dim() == 1:
                    parameter.fill_(stride)
        tokens = [encode(text, index_of(CHARACTERS)) for text in TEXTS]
        together = model(*pad_texts(tokens))
        alone = torch.cat([model(one[None]) for one in tokens])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    conv = next(iter(dynamic_layers(model).values()))
    assert conv.output_mask(torch.ones(1, 40, dtype=torch.bool)).shape[1] < 40  # it does stride


def test_pooling_is_over_the_real_characters():
    model = TextNet(3, 2, 4, 1, 3).eval()
    model.blocks = nn.Sequential()
    tokens, mask = torch.tensor([[1, 2, 0]]), torch.tensor([[True, True, False]])
    both = model.embed.weight[1:3]
    wanted = model.head(torch.cat([both.mean(0), both.amax(0)]))
    torch.testing.assert_close(model(tokens, mask)[0], wanted)


def test_unknown_characters_are_met_in_training():
    model = TextNet(1, 2, 8, 1, 3).train()
    seen = []
    model.embed.register_forward_hook(lambda _, given, output: seen.append(given[0]))
    model(torch.ones(50, 100, dtype=torch.long), torch.ones(50, 100, dtype=torch.bool))
    assert abs(float((seen[0] == 0).float().mean()) - UNKNOWN_SHARE) < 0.01
    model.eval()(torch.ones(50, 100, dtype=torch.long))
    assert (seen[1] == 1).all()


def test_all_unknown_characters_are_one():
    model, config = trained("dynamic_lightconv")
    first, second, known = logits(model, config, ["漢字", "éß", "an"])
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, known)


def test_composed_and_decomposed_characters_are_the_same():
    config = TextConfig(labels=["x", "y"], characters="é", **SIZES)
    one, two = logits(build_text(config), config, ["é", "e\u0301"])
    torch.testing.assert_close(one, two)


def test_label():
    model, config = trained("dyconv")
    named, shares = label(model, config, TEXTS)
    wanted = logits(model, config, TEXTS).softmax(1)
    assert named == [config.labels[i] for i in wanted.argmax(1)]
    torch.testing.assert_close(torch.tensor(shares), wanted.amax(1))
    assert label(model, config, []) == ([], [])


def test_a_mask_of_another_shape():
    with pytest.raises(ValueError, match="padding_mask has shape"):
        TextNet(3, 2, 8, 1, 3)(torch.ones(2, 4, dtype=torch.long), torch.ones(2, 3).bool())


def test_an_empty_text_has_no_label():
    model, config = trained("static")
    with pytest.raises(ValueError, match="text 1 is empty"):
        logits(model, config, ["a", ""])


def test_chunks_hold_everything_once_and_little_at_a_time(monkeypatch):
    monkeypatch.setattr(text_model, "MOST_TEXTS", 4)
    monkeypatch.setattr(text_model, "MOST_CHARACTERS", 100)
    lengths = [500, 1, 20, 30, 26, 3, 2, 1, 1, 40, 300]
    parts = list(chunks(lengths))
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) <= 4
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= 100
    assert [0] in parts
    assert not list(chunks([]))
