"""Qwen2-VL's turns as text, for this runtime's prompts (prompt.py) and, as a Jinja template, for other tools."""

__all__ = ["CHAT_TEMPLATE", "SYSTEM_TURN"]

SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

# For transformers; pictures stand where the message has them, each as one <|image_pad|> that its processor repeats.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    f"{SYSTEM_TURN}"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
