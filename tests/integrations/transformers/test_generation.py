"""Every way of generating that transformers offers, over a reduced sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import tokenreduce as tr
from support import reference
from support.reducers import EveryOther, UnevenRandom
from support.tiny_models import (
    CASES,
    IMAGE,
    TEXT,
    VOCABULARY,
    Case,
    lively,
    llava,
    noise,
    qwen2_5_vl,
    words,
)
from tokenreduce.errors import AttachmentError, UnsupportedGeneration
from tokenreduce_integrations import testbed

STEPS = 6
REDUCER = UnevenRandom()
BETWEEN_LAYERS = tr.Stage(reducer=EveryOther(), site="decoder", schedule={1: 0.5, 3: 0.25})
PIPELINES = {
    "projector": [REDUCER],
    "decoder": [BETWEEN_LAYERS],
    "both": [REDUCER, BETWEEN_LAYERS],
}


@pytest.fixture(params=PIPELINES)
def stages(request: pytest.FixtureRequest) -> Any:
    return PIPELINES[request.param]


def new_ids(case: Case, **options: Any) -> torch.Tensor:
    """Ids ``(B, steps)`` that the model adds to its prompts."""
    options = {"do_sample": False, "max_new_tokens": STEPS, **options}
    with torch.no_grad():
        ids = case.model.generate(**case.batch(), **options)
    return ids[:, case.inputs["input_ids"].shape[1] :]


def first_prompt(case: Case) -> Case:
    """The first prompt alone; only for prompts with one image, without padding."""
    inputs = {name: value[:1] for name, value in case.inputs.items()}
    return Case(case.model, inputs, case.items[:1])


@pytest.fixture
def one() -> Case:
    return first_prompt(llava())


def over_shorter_embeddings(case: Case, **options: Any) -> torch.Tensor:
    """Ids that the unmodified model adds to the embeddings of one prompt, reduced by hand."""
    [prompt] = reference.reduced_prompts(case, REDUCER)
    options = {"do_sample": False, "max_new_tokens": STEPS, **options}
    torch.manual_seed(0)
    with torch.no_grad():
        return case.model.generate(
            inputs_embeds=prompt.embeds, position_ids=prompt.positions, **options
        )


# -- ways of choosing tokens ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
        {"do_sample": True, "top_p": 0.8, "temperature": 1.5, "num_return_sequences": 2},
        {"do_sample": True, "min_p": 0.05, "typical_p": 0.9},
        {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
        {"num_beams": 2, "early_stopping": True, "bad_words_ids": [[30], [40, 41]]},
        {"suppress_tokens": list(range(60, 190)), "min_new_tokens": 3},
        {"sequence_bias": [[[25], 3.0]], "forced_eos_token_id": 33},
        {"prefix_allowed_tokens_fn": lambda _, ids: [21 + len(ids) % 2, 50, 51]},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_generate(one: Case, options: dict[str, Any]) -> None:
    if "prefix_allowed_tokens_fn" in options:
        # It is given the prompt too, which a generation over embeddings does not have.
        length = one.inputs["input_ids"].shape[1]
        given = options["prefix_allowed_tokens_fn"]
        expected = over_shorter_embeddings(one, **options)
        options = {"prefix_allowed_tokens_fn": lambda row, ids: given(row, ids[length:])}
    else:
        expected = over_shorter_embeddings(one, **options)
    torch.manual_seed(0)
    with tr.attach(one.model, REDUCER):
        assert torch.equal(new_ids(one, **options), expected)


class Watching(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """What generate tells to those who look on."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.streamed: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids)
        return scores

    def put(self, value: torch.Tensor) -> None:
        self.streamed.append(value.reshape(1, -1))

    def end(self) -> None:
        self.streamed.append(torch.empty(1, 0, dtype=torch.long))


class Stops(Watching):
    """Stops after three new tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length + 3

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        super().__call__(input_ids, scores)
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= self.length)


def test_processors_criteria_and_streamers_see_the_prompt_that_was_given(one: Case) -> None:
    ids = one.inputs["input_ids"]
    processor, criterion, streamer = Watching(), Stops(ids.shape[1]), Watching()
    with tr.attach(one.model, REDUCER):
        added = new_ids(
            one, logits_processor=[processor], stopping_criteria=[criterion], streamer=streamer
        )
    assert added.shape == (1, 3)
    whole = torch.cat([ids, added], 1)
    assert torch.equal(processor.seen[0], ids)
    assert torch.equal(processor.seen[-1], whole[:, :-1])
    assert torch.equal(criterion.seen[-1], whole)
    assert torch.equal(torch.cat(streamer.streamed, 1), whole)


def test_guidance_runs_the_model_without_its_prompt_beside(one: Case) -> None:
    # The unconditional branch is text; it runs between the steps, with a cache of its own.
    expected = over_shorter_embeddings(one)
    with tr.attach(one.model, REDUCER):
        assert torch.equal(new_ids(one, guidance_scale=1.0 + 1e-9), expected)
        assert not torch.equal(new_ids(one, guidance_scale=3.0), expected)


# -- candidates from elsewhere --------------------------------------------------------------------


def text_model(vocabulary: int = VOCABULARY) -> Any:
    text = {**TEXT, "num_hidden_layers": 1, "vocab_size": vocabulary}
    return lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(**text)))


@pytest.mark.parametrize("assistant", ["text-only", "multimodal", "reduced", "itself"])
def test_an_assistant_changes_nothing(one: Case, assistant: str, stages: Any) -> None:
    twin = copy.deepcopy(one.model)
    model = {"text-only": text_model(), "itself": one.model}.get(assistant, twin)
    with tr.attach(one.model, stages) as run:
        expected = new_ids(one, max_new_tokens=12)
        if stages == [REDUCER]:
            with run.disabled():
                assert torch.equal(over_shorter_embeddings(one, max_new_tokens=12), expected)
        if assistant == "reduced":
            run = tr.attach(twin, stages)
        ids = new_ids(one, assistant_model=model, max_new_tokens=12)
    run.detach()
    assert torch.equal(ids, expected)


def test_a_sampling_assistant_runs(one: Case) -> None:
    with tr.attach(one.model, REDUCER):
        ids = new_ids(one, assistant_model=text_model(), do_sample=True, max_new_tokens=12)
    assert ids.shape == (1, 12)


def tokenizer(order: list[int]) -> PreTrainedTokenizerFast:
    """One word is one token; ``order`` says which id each word has."""
    vocabulary = {f"w{word}": token for word, token in enumerate(order)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w3"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="w0", unk_token="w3")


def test_an_assistant_with_another_vocabulary_changes_nothing(one: Case) -> None:
    expected = over_shorter_embeddings(one, max_new_tokens=8)
    options = {
        "assistant_model": text_model(VOCABULARY + 10),
        "tokenizer": tokenizer(list(range(VOCABULARY))),
        "assistant_tokenizer": tokenizer([0, 1, 2, 3, *range(VOCABULARY + 9, 3, -1)]),
        "max_new_tokens": 8,
    }
    with tr.attach(one.model, REDUCER):
        assert torch.equal(new_ids(one, **options), expected)


def test_prompt_lookup_over_a_long_answer(one: Case) -> None:
    expected = over_shorter_embeddings(one, max_new_tokens=24)
    with tr.attach(one.model, REDUCER):
        options = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}
        assert torch.equal(new_ids(one, max_new_tokens=24, **options), expected)


# -- compiled decoding ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_decoding_over_a_static_cache(one: Case, backend: str) -> None:
    expected = over_shorter_embeddings(one)
    compilation = CompileConfig(backend=backend, mode="default")
    compilation._compile_all_devices = True
    counters = torch._dynamo.utils.counters
    counters.clear()
    try:
        with tr.attach(one.model, REDUCER):
            for _ in range(2):
                ids = new_ids(one, cache_implementation="static", compile_config=compilation)
                assert torch.equal(ids, expected)
        assert counters["stats"]["unique_graphs"] > 0
    finally:
        torch.compiler.reset()


# -- what a shorter sequence cannot serve ---------------------------------------------------------


@pytest.mark.parametrize("size", [10, 64])
def test_chunked_prefill_of_an_image_is_refused_before_anything_runs(one: Case, size: int) -> None:
    config = GenerationConfig(prefill_chunk_size=size, max_new_tokens=1, pad_token_id=0)
    with tr.attach(one.model, REDUCER) as run:
        for options in ({"prefill_chunk_size": size}, {"generation_config": config}):
            with pytest.raises(UnsupportedGeneration, match="prefill_chunk_size"):
                one.model.generate(**one.batch(), **options)
        with pytest.raises(AttachmentError, match="has not run"):
            _ = run.receipt


def test_chunked_prefill_of_text_is_served(one: Case) -> None:
    text = Case(one.model, {"input_ids": torch.tensor([words(12, 1)])}, ())
    expected = new_ids(text, prefill_chunk_size=5)
    with tr.attach(one.model, REDUCER):
        assert torch.equal(new_ids(text, prefill_chunk_size=5), expected)


def test_continuous_batching_of_an_image_is_refused(one: Case) -> None:
    refused = pytest.raises(UnsupportedGeneration, match="paged")
    with tr.attach(one.model, REDUCER), refused:
        new_ids(one, cache_implementation="paged")


def test_generate_is_left_as_it_was(one: Case) -> None:
    run = tr.attach(one.model, REDUCER)
    assert "generate" in vars(one.model)
    run.detach()
    assert "generate" not in vars(one.model)


# -- several turns --------------------------------------------------------------------------------


def next_turn(case: Case, first: Any, added: list[list[int]], **visual: Any) -> Case:
    """The whole dialogue, with ``added`` after what the model said."""
    ids = torch.cat([first.sequences, torch.tensor(added)], 1)
    mask = case.inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
    inputs = {**case.inputs, "input_ids": ids, "attention_mask": mask, **visual}
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        kinds = torch.cat([kinds, kinds.new_zeros(len(ids), ids.shape[1] - kinds.shape[1])], 1)
        inputs["mm_token_type_ids"] = kinds
    return Case(case.model, inputs, case.items)


def spoken(case: Case, **options: Any) -> Any:
    with torch.no_grad():
        return case.model.generate(
            **case.batch(),
            do_sample=False,
            max_new_tokens=STEPS,
            return_dict_in_generate=True,
            **options,
        )


def test_a_second_turn_of_generate_continues_what_was_kept() -> None:
    case = llava()
    with tr.attach(case.model, REDUCER) as run:
        first = spoken(case)
        dialogue = next_turn(case, first, [words(4, 11), words(4, 12)])
        text = {name: dialogue.inputs[name] for name in ("input_ids", "attention_mask")}
        held = first.past_key_values.held_length()
        receipt = run.receipt
        continued = new_ids(Case(case.model, text, ()), past_key_values=first.past_key_values)
        assert run.receipt is receipt
        # 4 words and the last token said are new to the cache; the last token of all never enters
        assert first.past_key_values.held_length() == held + 5 + STEPS - 1
    assert torch.equal(continued, reference.greedy(dialogue, REDUCER, STEPS)[0])


def test_an_image_of_a_later_turn_is_reduced_and_earlier_ones_stay(one: Case) -> None:
    picture = noise(1, 3, 56, 56, seed=5)
    with tr.attach(one.model, REDUCER) as run:
        first = spoken(one)
        kept = run.receipt.tokens_out
        dialogue = next_turn(one, first, [[*words(3, 11), *[IMAGE] * 16, *words(2, 12)]])
        turn = dialogue.inputs["input_ids"][:, first.sequences.shape[1] - 1 :]
        second = run.model(
            input_ids=turn, pixel_values=picture, past_key_values=first.past_key_values
        )
        assert [item.tokens_in for item in run.receipt.items] == [16]
        assert kept < 16
    pictures = torch.cat([one.inputs["pixel_values"], picture])
    items = (one.items[0], one.items[0])
    whole = Case(one.model, {**dialogue.inputs, "pixel_values": pictures}, items)
    expected = reference.greedy(whole, REDUCER, 1)[1][0]
    assert (second.logits[:, -1] - expected).abs().max() < 1e-5


def positions_of_the_second_turn(case: Case) -> torch.Tensor:
    """Position ids that the decoder gets for what the second turn adds."""
    first = spoken(case)
    dialogue = next_turn(case, first, [words(4, 11), words(4, 12)])
    grids = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    grids = (*grids, "video_grid_thw", "second_per_grid_ts")
    text = {name: dialogue.inputs[name] for name in grids}
    seen: list[torch.Tensor] = []

    def see(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    decoder = reference.text_decoder(case)
    handle = decoder.register_forward_pre_hook(see, with_kwargs=True)
    new_ids(Case(case.model, text, ()), past_key_values=first.past_key_values)
    handle.remove()
    return torch.cat(seen, -1)


def test_positions_of_a_dialogue_about_a_clip_are_those_of_the_model() -> None:
    # The model itself counts a continued clip otherwise than a fresh one; that is left as it is.
    case = qwen2_5_vl()
    expected = positions_of_the_second_turn(case)
    with tr.attach(case.model, REDUCER):
        assert torch.equal(positions_of_the_second_turn(case), expected)


# -- encode once, ask many ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_features_encoded_once_serve_many_questions(name: str) -> None:
    case = CASES[name]()
    owner = case.model.model
    batch = case.batch()
    pixels = {key: batch.pop(key) for key in list(batch) if key.startswith("pixel")}
    runs = []
    tower = owner.visual if hasattr(owner, "visual") else owner.vision_tower
    handle = tower.register_forward_hook(lambda *_: runs.append(1))
    with tr.attach(case.model, REDUCER) as run, torch.no_grad():
        expected = new_ids(case)
        encoded = {}
        if "pixel_values" in pixels:
            arguments = {
                key: batch[key] for key in ("image_grid_thw", "image_sizes") if key in batch
            }
            encoded["image"] = owner.get_image_features(
                pixels["pixel_values"], **arguments, return_dict=True
            )
        if "pixel_values_videos" in pixels:
            arguments = {key: batch[key] for key in ("video_grid_thw",) if key in batch}
            encoded["video"] = owner.get_video_features(
                pixels["pixel_values_videos"], **arguments, return_dict=True
            )
        runs.clear()
        for _ in range(2):
            ids = case.model.generate(
                **batch, mm_encoder_outputs=dict(encoded), do_sample=False, max_new_tokens=STEPS
            )
            assert torch.equal(ids[:, batch["input_ids"].shape[1] :], expected)
            assert run.receipt.tokens_out < run.receipt.tokens_in
    handle.remove()
    assert not runs


def test_a_prefix_prefilled_once_serves_many_questions(one: Case) -> None:
    questions = [words(4, 11), words(6, 12)]
    prefix = one.inputs["input_ids"]
    with tr.attach(one.model, REDUCER) as run:
        cache = prefilled(one)
        for question in questions:
            ids = torch.cat([prefix, torch.tensor([question])], 1)
            mask = torch.ones_like(ids)
            asked = Case(run.model, {"input_ids": ids, "attention_mask": mask}, ())
            answer = new_ids(asked, past_key_values=copy.deepcopy(cache))
            whole = {**one.inputs, "input_ids": ids, "attention_mask": mask}
            fresh = new_ids(Case(run.model, whole, one.items))
            assert torch.equal(answer, fresh)


# -- pipelines of transformers --------------------------------------------------------------------


def test_the_pipeline_of_transformers() -> None:
    model, processor = testbed.load("b")
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    image, prompt = testbed.example_image(), testbed.prompt("what is the background ?")
    options = {"max_new_tokens": 3, "return_full_text": False}
    plain = ask(images=image, text=prompt, **options)[0]["generated_text"]
    with tr.attach(model, tr.create_strategy("norm-topk", keep=9)) as run:
        reduced = ask(images=image, text=prompt, **options)[0]["generated_text"]
        assert run.receipt.tokens_out == 9
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert reduced.split() == text.split()
        batch = ask(images=[image, image], text=[prompt, prompt], batch_size=2, **options)
        assert [answer["generated_text"].split() for answer in batch] == [text.split()] * 2
        with run.disabled():
            assert ask(images=image, text=prompt, **options)[0]["generated_text"] == plain


def prefilled(case: Case) -> Any:
    with torch.no_grad():
        return case.model(**case.batch(), use_cache=True).past_key_values


# -- what becomes of a cache ----------------------------------------------------------------------


class Interrupt:
    """A hook that acts as Ctrl-C while a layer of the decoder runs."""

    def __init__(self, case: Case, layer: int) -> None:
        layers = reference.text_decoder(case).layers
        self.handle = layers[layer].register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.handle.remove()
        raise KeyboardInterrupt


def test_an_interrupted_step_leaves_a_cache_that_tells_its_length(one: Case, stages: Any) -> None:
    length = one.inputs["input_ids"].shape[1]
    token = torch.tensor([[30]])
    with tr.attach(one.model, stages), torch.no_grad():
        expected = one.model(input_ids=token, past_key_values=prefilled(one)).logits
        cache = prefilled(one)
        Interrupt(one, layer=0)
        with pytest.raises(KeyboardInterrupt):
            one.model(input_ids=token, past_key_values=cache)
        assert cache.get_seq_length() == length
        again = one.model(input_ids=token, past_key_values=cache)
        assert torch.equal(again.logits, expected)
        assert again.past_key_values is cache
        assert cache.get_seq_length() == length + 1


def test_an_interrupted_prefill_does_not_disturb_what_comes_after(one: Case, stages: Any) -> None:
    text = torch.tensor([words(5, 3)])
    with torch.no_grad():
        expected = one.model(input_ids=text).logits
    with tr.attach(one.model, stages), torch.no_grad():
        answer = new_ids(one)
        for layer in (0, 2):
            Interrupt(one, layer)
            with pytest.raises(KeyboardInterrupt):
                one.model(**one.batch())
            assert torch.equal(one.model(input_ids=text).logits, expected)
            assert torch.equal(new_ids(one), answer)


def test_an_interrupted_prefill_leaves_a_cache_that_tells_its_length(one: Case) -> None:
    length = one.inputs["input_ids"].shape[1]
    with tr.attach(one.model, REDUCER), torch.no_grad():
        cache = DynamicCache(config=one.model.config.get_text_config())
        for layer, held in ((0, 0), (2, length)):
            Interrupt(one, layer)
            with pytest.raises(KeyboardInterrupt):
                one.model(**one.batch(), past_key_values=cache)
            assert cache.get_seq_length() == held
    with pytest.raises(AttachmentError, match="continue it while"):
        one.model(input_ids=torch.tensor([[30]]), past_key_values=cache)


def test_a_cache_can_be_cropped_to_where_visual_tokens_end(one: Case, stages: Any) -> None:
    ids = one.inputs["input_ids"]
    end = int((ids[0] == IMAGE).nonzero()[-1]) + 1
    after = ids.shape[1] - end
    question = torch.tensor([words(4, 11)])
    with tr.attach(one.model, stages), torch.no_grad():
        short = {name: value[:, :end] for name, value in one.inputs.items() if value.ndim == 2}
        beginning = one.model(**one.batch() | short, use_cache=True).past_key_values
        expected = one.model(input_ids=question, past_key_values=beginning).logits
        cache = prefilled(one)
        one.model(input_ids=torch.tensor([words(3, 12)]), past_key_values=cache)
        cache.crop(-(3 + after))
        assert cache.get_seq_length() == end
        logits = one.model(input_ids=question, past_key_values=cache).logits
        assert (logits - expected).abs().max() < 1e-5


def test_a_cache_cannot_be_cropped_inside_visual_tokens(one: Case, stages: Any) -> None:
    with tr.attach(one.model, stages):
        cache = prefilled(one)
        length = cache.get_seq_length()
        held = cache.held_length()
        with pytest.raises(AttachmentError, match="cannot be cropped by 15 tokens"):
            cache.crop(-15)
        assert (cache.get_seq_length(), cache.held_length()) == (length, held)
        cache.crop(-length)
        assert cache.get_seq_length() == 0
        assert torch.equal(new_ids(one, past_key_values=cache), new_ids(one))


# -- controls -------------------------------------------------------------------------------------


def test_controls_are_refused_after_detaching(one: Case) -> None:
    with tr.attach(one.model, tr.create_strategy("norm-topk", keep=4)) as run:
        new_ids(one)
    assert run.receipt.tokens_out == 4
    for control in (run.disabled(), run.budget(keep=8)):
        with pytest.raises(AttachmentError, match="was detached"), control:
            pass
