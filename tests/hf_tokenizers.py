"""Hugging Face tokenizers for tests, trained on the spot, with chat templates in the shapes of the families that people use."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import xtuner_hydra

EXAMPLES = Path(xtuner_hydra.__file__).parent / "examples"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_ENDLESS = CHATML_MARKED.replace(" + '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}<|im_end|>")

DROPS_THINKING = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")

LLAMA3 = (
    "{{- bos_token }}{% for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA3_DATED = LLAMA3.replace("{{- bos_token }}", "{{- bos_token + strftime_now('%d %b %Y') }}")

NO_MARKERS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + ' Answer: ' }}"
    "{% else %}{{ message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
)

FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + (message['role'] if loop.last else 'past') + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# In the shape that Qwen3's model card documents: thinking is kept after the last question only, and the last answer always has a block for it.
QWEN3 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures" }}
    {{- " within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:" }}
    {{- "\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- set answers_a_call = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') %}
    {%- if ns.searching and message.role == "user" and not answers_a_call %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thinking = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thinking = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thinking = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or thinking) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + thinking.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")


def byte_level(special=CHATML_TOKENS, vocab_size=900, whole_lines=False, trim=True):
    """A byte-level BPE like GPT-2's. whole_lines: merges may cross spaces and line ends. trim: its post-processor hides spaces, as GPT-2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole_lines)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    lines = (EXAMPLES / "openai_sft.jsonl").read_text(encoding="utf-8").splitlines()
    if whole_lines:
        lines = ["\n\n\n"] * 5000 + [": \n", "t\n a", "\n \n", " \nas"] * 1000 + lines  # frequent, so that these are merged first
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def save(directory, tokenizer, template, **special):
    """A directory that AutoTokenizer loads."""
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = template
    made.save_pretrained(directory)
    return directory


def chatml(directory, template=CHATML, **options):
    """Qwen-like: no BOS, <|im_end|> ends a turn and a text ends with <|endoftext|>."""
    return save(directory, byte_level(**options), template, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def llama3(directory, template=LLAMA3, **options):
    """Llama-3-like: a BOS by template and by post-processor, no padding token."""
    tokenizer = byte_level(LLAMA3_TOKENS, **options)
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    around = processors.TemplateProcessing(single="<|begin_of_text|> $A", pair=None, special_tokens=[("<|begin_of_text|>", bos)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), around])
    return save(directory, tokenizer, template, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def sentencepiece_like(directory, template):
    """Llama-2-like: words start with a lower one-eighth block, and every text is given one."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    lines = (EXAMPLES / "openai_sft.jsonl").read_text(encoding="utf-8").splitlines()
    words = sorted({word for line in lines for word in line.split()})
    alphabet = ["▁", *map(chr, range(32, 127)), "\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=[one for one in alphabet if len(one) == 1],
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    around = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    tokenizer.post_processor = around
    return save(directory, tokenizer, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
