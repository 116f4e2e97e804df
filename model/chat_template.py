"""The chat template of Qwen3-VL, Instruct and Thinking, as jinja text that transformers and vLLM render alike.

The format is the one Qwen3-VL was trained on (ChatML; `trl/chat_templates/qwen3_vl.jinja` renders the Instruct variant, `qwen3.jinja`
the history rules of the Thinking variant); the template text is our own. What it writes:

- one turn is `<|im_start|>role`, newline, content, `<|im_end|>`, newline;
- an image is `<|vision_start|><|image_pad|><|vision_end|>`, a video the same with `<|video_pad|>`; with `add_vision_id=True` they are
  numbered (`Picture 1: `, `Video 1: `);
- tools are listed in the system turn; a call is `<tool_call>` with a JSON object; results are `<tool_response>` blocks, neighbours
  sharing one user turn;
- Thinking: the generation prompt ends inside an open think block; assistant turns before the last user query lose their think block, turns
  after it keep it, and the last turn always has one, be it empty.

Deliberate differences from those templates, each where they would lose or invent something without a word:

- A part is judged by its `type` alone. There, a text part read from a table, `{"type": "text", "text": ..., "image": None}`, renders as an
  image because the key exists.
- Content None (an assistant turn that only calls tools) is empty text; there, it is an error of the template.
- These raise: an unknown role or part type, an image or video in a system or assistant turn, a system turn that is not the first.
- Before a tool call a newline is written if the assistant's text is not empty; there, if the list of its parts is not empty.
- Thinking: what follows the first `</think>` is the answer, whole; there, text between the first and the last `</think>` is dropped.
- Thinking: a conversation without any user query keeps its think blocks; there, it loses them.

Like the published Instruct template, ours ignores the key `reasoning_content`; only the Thinking variant reads it.
"""

from __future__ import annotations

_CONTENT = """\
{%- set shown = namespace(images=0, videos=0) -%}
{%- macro write(content, role) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is not none -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif part.type not in ['image', 'image_url', 'video'] -%}
                {{- raise_exception("unknown content part type '" ~ part.type ~ "' in a message from "
                    ~ role ~ ": give text, image or video") -}}
            {%- elif role not in ['user', 'tool'] -%}
                {{- raise_exception("a message from " ~ role ~ " holds a part of type '" ~ part.type
                    ~ "': only user and tool messages may hold images and videos") -}}
            {%- elif part.type == 'video' -%}
                {%- set shown.videos = shown.videos + 1 -%}
                {{- ('Video ' ~ shown.videos ~ ': ' if add_vision_id else '') ~ '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- else -%}
                {%- set shown.images = shown.images + 1 -%}
                {{- ('Picture ' ~ shown.images ~ ': ' if add_vision_id else '') ~ '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

# The wording of the tool instructions is part of the format: the model was trained on these very sentences.
_SYSTEM = """\
{%- if tools or messages[0].role == 'system' -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages[0].role == 'system' -%}
        {{- write(messages[0].content, 'system') ~ ('\\n\\n' if tools else '') -}}
    {%- endif -%}
    {%- if tools -%}
        {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' -}}
        {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>\\n' -}}
        {%- for tool in tools -%}
            {{- (tool | tojson) ~ '\\n' -}}
        {%- endfor -%}
        {{- '</tools>\\n\\nFor each function call, return a json object with function name and arguments ' -}}
        {{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' -}}
        {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
"""

# The last query is the last user message that is not a tool result wrapped by hand.
_FIND_LAST_QUERY = """\
{%- set query = namespace(index=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set texts = [message.content] if message.content is string
            else (message.content or []) | map(attribute='text', default='') | map('string') | list -%}
        {%- if not (texts and texts[0].startswith('<tool_response>') and texts[-1].endswith('</tool_response>')) -%}
            {%- set query.index = loop.index0 -%}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
"""

_TURNS = """\
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- if not loop.first -%}
            {{- raise_exception('message ' ~ loop.index0 ~ ' is a system message: only the first message may be one') -}}
        {%- endif -%}
    {%- elif message.role == 'user' -%}
        {{- '<|im_start|>user\\n' ~ write(message.content, 'user') ~ '<|im_end|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {%- set text = write(message.content, 'assistant') -%}
        {{- '<|im_start|>assistant\\n' -}}
@THOUGHT@        {{- text -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {{- '\\n' if text or not loop.first else '' -}}
            {{- '<tool_call>\\n{"name": "' ~ function.name ~ '", "arguments": ' -}}
            {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' -}}
        {{- '\\n<tool_response>\\n' ~ write(message.content, 'tool') ~ '\\n</tool_response>' -}}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
    {%- else -%}
        {{- raise_exception("unknown role '" ~ message.role ~ "': a message is from system, user, assistant or tool") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n@OPENING@' -}}
{%- endif -%}
"""

_THOUGHT = """\
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' -%}
        {%- if message.reasoning_content is not string and '</think>' in text -%}
            {%- set thought = text.split('</think>', 1)[0].split('<think>')[-1] -%}
            {%- set text = text.split('</think>', 1)[1].lstrip('\\n') -%}
        {%- endif -%}
        {%- if loop.index0 > query.index and (loop.last or thought) -%}
            {{- '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' -}}
            {%- set text = text.lstrip('\\n') -%}
        {%- endif -%}
"""


def chat_template(thinking: bool) -> str:
    """Returns the jinja text of the Thinking variant if `thinking`, else of the Instruct variant.

    A rendered conversation with `add_generation_prompt=True` ends in `<|im_start|>assistant` and a newline; Thinking adds `<think>` and a
    newline, so that a sampled response starts inside the think block and only closes it.
    """
    if thinking:
        return _CONTENT + _SYSTEM + _FIND_LAST_QUERY + _TURNS.replace("@THOUGHT@", _THOUGHT).replace("@OPENING@", "<think>\\n")
    return _CONTENT + _SYSTEM + _TURNS.replace("@THOUGHT@", "").replace("@OPENING@", "")
