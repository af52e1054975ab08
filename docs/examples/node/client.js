// A client with Node, gRPC and our .proto files, and nothing else of ours.
//
//   npm install && node client.js ../../../proto 127.0.0.1:7001
//
// Prints one JSON object: a unary answer, the same streamed, and a refusal with its reason.
"use strict";

const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [folder, target] = process.argv.slice(2);
const types = loader.loadSync(["ostinato/v1/generation.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"], {
  includeDirs: [folder, path.join(folder, "third_party")],
  keepCase: true,
  longs: String, // a seed is a uint64, and no JavaScript number holds that
  enums: String,
  defaults: true,
  oneofs: true,
});
const { Generation } = grpc.loadPackageDefinition(types).ostinato.v1;
const client = new Generation(target, grpc.credentials.createInsecure());

const request = {
  items: [{ text: "Shanghai is" }, { token_ids: { ids: [83, 104] }, parameters: { seed: "0" } }],
  parameters: { seed: "18446744073709551615", temperature: 0.7, max_new_tokens: 8, ignore_eos: true, logprobs: 2 },
};

function unary(message) {
  return new Promise((resolve, reject) => {
    client.Generate(message, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

async function streamed(message) {
  const events = [];
  for await (const event of client.GenerateStream(message)) events.push(event);
  return events;
}

// What a program goes by: the reason, and which fields were bad. The message is for people.
function refusal(error) {
  const status = types["google.rpc.Status"].deserialize(error.metadata.get("grpc-status-details-bin")[0]);
  const detail = (name) => {
    const found = status.details.find((each) => each.type_url.endsWith(`/google.rpc.${name}`));
    return found && types[`google.rpc.${name}`].deserialize(found.value);
  };
  const fields = detail("BadRequest")?.field_violations.map((violation) => violation.field);
  return { code: error.code, reason: detail("ErrorInfo")?.reason, fields };
}

async function main() {
  const said = { unary: await unary(request), events: await streamed(request) };
  said.refused = await unary({ items: [{ text: "a" }], parameters: { top_p: 2 } }).catch(refusal);
  client.close();
  const plain = (key, value) => (value?.type === "Buffer" ? Buffer.from(value.data).toString("base64") : value);
  console.log(JSON.stringify(said, plain));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
