"""The miniature's tokenizer: one token per character, plus ``\\boxed{``, with a chat template."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
VOCABULARY = (PAD, EOS, UNK, *"0123456789", "+", "-", ";", ":", "=", r"\boxed{", "}", "M", "L")

# `=` closes the problem and opens the answer: it is this chat format's generation prompt.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '=' + message['content'] + eos_token }}"
    "{%- else -%}{{ raise_exception('the miniature knows only the roles user and assistant') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '=' }}{%- endif -%}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; what it saves is loaded by ``AutoTokenizer.from_pretrained``.

    Characters outside the vocabulary become ``<unk>``. Decoding joins tokens without spaces, so text made of
    the vocabulary survives encode and decode unchanged.
    """
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
