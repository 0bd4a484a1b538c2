// Asks the server at URL with KEY through OpenAI's own client for Node, and asserts what its users see: node client.mjs URL KEY
// The key may have three answers in progress, no more.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const base = { model: "live", messages: [{ role: "user", content: "Hello, who are you?" }], max_tokens: 12, seed: 3 };
const ask = (more = {}) => client.chat.completions.create({ ...base, ...more });

const answer = await ask();
const text = answer.choices[0].message.content;
assert.ok(text.length > 0);
assert.equal(answer.choices[0].finish_reason, "length");
assert.equal(answer.usage.completion_tokens, 12);
assert.equal(answer.alignkit.policy_version, answer.model);
assert.match(answer._request_id, /^req-/);

let streamed = "";
const finishes = [];
const usages = [];
for await (const chunk of await ask({ stream: true, stream_options: { include_usage: true } })) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  if (chunk.choices[0]?.finish_reason) finishes.push(chunk.choices[0].finish_reason);
  if (chunk.usage) usages.push(chunk.usage);
}
assert.equal(streamed, text);
assert.deepEqual(finishes, ["length"]);
assert.deepEqual(usages, [answer.usage]);

const several = (await ask({ n: 3 })).choices.map((choice) => choice.message.content);
assert.equal(several[0], text);
assert.equal(new Set(several).size, 3);

const tokens = (await ask({ logprobs: true, top_logprobs: 2 })).choices[0].logprobs.content;
assert.equal(new TextDecoder().decode(Uint8Array.from(tokens.flatMap((token) => token.bytes))), text);
assert.ok(tokens.every((token) => token.logprob < 0 && token.top_logprobs.length === 2));

const stop = text.slice(4, 6);
assert.equal((await ask({ stop })).choices[0].message.content, text.slice(0, text.indexOf(stop)));

const helped = client.chat.completions.stream({ ...base, stop });
assert.equal(await helped.finalContent(), text.slice(0, text.indexOf(stop)));

const refused = async (kind, code, more, using = client) => {
  const error = await using.chat.completions.create({ ...base, ...more }).then(
    () => assert.fail(`no ${code}`),
    (error) => error,
  );
  assert.ok(error instanceof kind, `${error}`);
  assert.equal(error.code, code);
  return error;
};
const tools = [{ type: "function", function: { name: "weather", parameters: { type: "object", properties: {} } } }];
assert.equal((await refused(OpenAI.BadRequestError, "unsupported_value", { tools })).param, "tools");
await refused(OpenAI.NotFoundError, "model_not_found", { model: "gpt-4o" });
await refused(OpenAI.AuthenticationError, "invalid_api_key", {}, new OpenAI({ baseURL, apiKey: "ak_wrong", maxRetries: 0 }));
await refused(OpenAI.RateLimitError, "key_concurrency", { n: 4 });

// An endless answer holds one of three places until its stream is aborted.
const endless = { stream: true, max_tokens: 400, logit_bias: { 3: -100 } };
const stream = await ask(endless);
for await (const chunk of stream) if (chunk.choices[0].delta.content) break; // leaving the loop aborts
const aborted = new AbortController();
const other = await client.chat.completions.create({ ...base, ...endless }, { signal: aborted.signal });
aborted.abort();
for await (const _ of other);
const until = Date.now() + 20_000;
for (;;) {
  try {
    assert.equal((await ask({ n: 3 })).choices.length, 3);
    break;
  } catch (error) {
    if (error.code !== "key_concurrency" || Date.now() > until) throw error;
  }
}

assert.deepEqual((await client.models.list()).data.map((model) => model.id), ["live", answer.model]);
console.log("it got what it expects");
