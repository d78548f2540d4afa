"""A folder with the code of Pebble and random weights, as its authors would publish it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

CODE = Path(__file__).parents[1] / "pebble-vl"
CONFIG = {
    "model_type": "pebble",
    "architectures": ["PebbleForConditionalGeneration"],
    "auto_map": {
        "AutoConfig": "configuration_pebble.PebbleConfig",
        "AutoModelForImageTextToText": "modeling_pebble.PebbleForConditionalGeneration",
        "AutoProcessor": "processing_pebble.PebbleProcessor",
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    },
}
WORDS = ["<pad>", "<s>", "<unk>", "<image>", "what", "is", "this", "?", "a", "pebble", "shore"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The published folder."""
    path = tmp_path_factory.mktemp("models") / "pebble-vl"
    shutil.copytree(CODE, path)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "processor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "PebbleProcessor",
                "auto_map": {"AutoProcessor": "processing_pebble.PebbleProcessor"},
                "patch_size": 14,
            }
        )
    )
    _tokenizer().save_pretrained(path)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    published = dict(CONFIG)
    model.save_pretrained(path)
    # Saving rewrites the configuration; what was published stays.
    (path / "config.json").write_text(json.dumps(published))
    return path


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    )
