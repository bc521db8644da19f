"""Chat templates in the style of well-known models, shortened to what makes each of them special."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
THINKING = (
    "{%- for m in messages %}{%- set c = m.content %}"
    "{%- if '</think>' in c %}{%- set c = c.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if '</think>' in c %}{%- set c = c.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- c + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)
"""Qwen 3: a thought in front of the last answer; where thinking is off, an empty one in the generation prompt."""
DATED = (
    "{{- bos_token + '<|header|>system<|end|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '<|eot|>' }}"
    "{%- for m in messages %}{{- '<|header|>' + m['role'] + '<|end|>\\n\\n' + m['content'] | trim + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header|>assistant<|end|>\\n\\n' }}{%- endif %}"
)
"""Llama 3: a system turn with today's date; turns are stripped."""
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' }}{{ (m['content'] | trim) + '<end>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\\n' }}{% endif %}"
)
"""Gemma: an assistant is a model."""
INSTRUCTION = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""Mistral: no generation prompt; a space in front of answers."""
EOS_AT_THE_END = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""Phi 3: EOS ends a conversation that awaits no answer."""
BOS_EACH_TURN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Llama 2."""
LINES_BETWEEN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + (eos_token if m['role'] == 'assistant' else '') }}"
    "{{ '' if loop.last else '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"
)
"""Tulu: line breaks between turns, none at the end."""
CHATS = {
    "chatml": CHATML, "thinking": THINKING, "dated": DATED, "alternating": ALTERNATING, "instruction": INSTRUCTION,
    "eos at the end": EOS_AT_THE_END, "lines between": LINES_BETWEEN,
}  # fmt: skip
