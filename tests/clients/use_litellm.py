# pyright: basic, reportMissingImports=false
"""litellm: ask, stream, text completion, and errors as its own exceptions."""

import sys

import litellm

where = {"api_base": f"{sys.argv[1]}/v1", "api_key": "none"}
messages = [{"role": "user", "content": "Hello there"}]
answer = litellm.completion(model="openai/fake", messages=messages, max_tokens=4, seed=3, **where)
assert answer.choices[0].message.content.startswith("t"), answer
assert answer.usage.completion_tokens == 4, answer.usage

chunks = litellm.completion(model="openai/fake", messages=messages, max_tokens=4, seed=3, stream=True, **where)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content

text = litellm.text_completion(model="text-completion-openai/fake", prompt="Once", max_tokens=3, **where)
assert text.choices[0].text.count("t") == 3, text

try:
    litellm.completion(model="openai/fake", messages=messages, temperature=9, max_retries=0, **where)
except litellm.BadRequestError as error:
    assert "temperature" in str(error)  # noqa: PT017 - a script, not a test
else:
    raise AssertionError("a temperature of 9 was accepted")
print("done")
