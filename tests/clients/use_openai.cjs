// The JavaScript openai package: chat, stream with usage, responses with its helper, text, batches, errors, cancelling.
const assert = require("node:assert");
const { default: OpenAI, toFile } = require("openai");

async function main() {
  const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
  const messages = [{ role: "user", content: "Hello there" }];
  const asked = { model: "fake", messages, max_tokens: 4, seed: 3 };

  const answer = await client.chat.completions.create({ ...asked, n: 2 });
  assert.equal(answer.choices.length, 2);
  assert.equal(answer.usage.completion_tokens, 8);

  let text = "";
  let usage = null;
  const stream = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, answer.choices[0].message.content);
  assert.equal(usage.completion_tokens, 4);

  const response = await client.responses.create({ model: "fake", input: "Hello", max_output_tokens: 4 });
  assert.equal(response.status, "incomplete");
  assert.ok(response.output_text.startsWith("t"));
  const types = [];
  for await (const event of await client.responses.create({ model: "fake", input: "And?", max_output_tokens: 4, stream: true, previous_response_id: response.id })) {
    types.push(event.type);
  }
  assert.equal(types[0], "response.created");
  assert.equal(types.at(-1), "response.incomplete");
  assert.equal((await client.responses.retrieve(response.id)).output_text, response.output_text);

  const completion = await client.completions.create({ model: "fake", prompt: "Once", max_tokens: 3 });
  assert.equal(completion.choices[0].finish_reason, "length");

  const lines = ["a", "b"].map((id) => JSON.stringify({ custom_id: id, method: "POST", url: "/v1/chat/completions", body: asked }));
  const file = await client.files.create({ file: await toFile(Buffer.from(lines.join("\n")), "in.jsonl"), purpose: "batch" });
  let batch = await client.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" });
  while (["validating", "in_progress", "finalizing"].includes(batch.status)) {
    await new Promise((resolve) => setTimeout(resolve, 50));
    batch = await client.batches.retrieve(batch.id);
  }
  assert.deepEqual(batch.request_counts, { total: 2, completed: 2, failed: 0 });
  const output = await (await client.files.content(batch.output_file_id)).text();
  assert.deepEqual(output.trim().split("\n").map((line) => JSON.parse(line).custom_id).sort(), ["a", "b"]);

  await assert.rejects(client.chat.completions.create({ ...asked, temperature: 9 }), (error) => {
    return error instanceof OpenAI.BadRequestError && error.param === "temperature";
  });

  const cut = await client.chat.completions.create({ ...asked, max_tokens: 4000, stream: true });
  for await (const chunk of cut) {
    if (chunk.choices[0]?.delta?.content) break; // leaving the loop aborts the request
  }
  assert.ok(cut.controller.signal.aborted);
  console.log("done");
}

main();
