# pyright: basic, reportMissingImports=false
"""langchain-openai: ask, stream with usage, and a batch of choices."""

import sys

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

url = f"{sys.argv[1]}/v1"
chat = ChatOpenAI(base_url=url, api_key="none", model="fake", seed=3, max_tokens=4, max_retries=0, stream_usage=True)

answer = chat.invoke([("system", "Be brief."), ("user", "Hello there")])
assert answer.content.startswith("t"), answer
assert answer.usage_metadata["output_tokens"] == 4, answer.usage_metadata
assert answer.response_metadata["finish_reason"] == "length", answer.response_metadata

chunks = list(chat.stream("Hello there"))
assert len(chunks) > 2
whole = chunks[0]
for chunk in chunks[1:]:
    whole += chunk
assert whole.content.count("t") == 4, whole
assert whole.usage_metadata["output_tokens"] == 4, whole.usage_metadata

pair = ChatOpenAI(base_url=url, api_key="none", model="fake", n=2, max_tokens=4, max_retries=0)
assert len(pair.generate([[HumanMessage("Hello")]]).generations[0]) == 2

text = OpenAI(base_url=url, api_key="none", model="fake", max_tokens=3, max_retries=0)
assert text.invoke("Once upon").count("t") == 3
print("done")
