// What somebody writes who has Node and our .proto files, and nothing else of ours.
//
//   node client.js PROTO_FOLDER TARGET
//
// Prints one JSON object: a unary answer, a streamed one, and a refusal with its details.
"use strict";

const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const protobuf = require("protobufjs");

const [folder, target] = process.argv.slice(2);
const options = {
  includeDirs: [folder, path.join(folder, "third_party")],
  keepCase: true,
  longs: String,
  enums: String,
  defaults: true,
  oneofs: true,
};
const types = loader.loadSync(["ostinato/v1/generation.proto", "google/rpc/status.proto"], options);
const { Generation } = grpc.loadPackageDefinition(types).ostinato.v1;
const client = new Generation(target, grpc.credentials.createInsecure());

// The two details that we look at; google/rpc/error_details.proto has them and more.
const details = protobuf.parse(`
  syntax = "proto3";
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message BadRequest { repeated FieldViolation field_violations = 1; }
  message FieldViolation { string field = 1; string description = 2; }
`, { keepCase: true }).root;

const request = {
  items: [{ text: "Shanghai is" }, { token_ids: { ids: [83, 104] }, parameters: { seed: "0" } }],
  parameters: { seed: "18446744073709551615", temperature: 0.7, max_new_tokens: 8, ignore_eos: true, logprobs: 2 },
};

function unary(message) {
  return new Promise((resolve, reject) => {
    client.Generate(message, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

function streamed(message) {
  return new Promise((resolve, reject) => {
    const events = [];
    client.GenerateStream(message).on("data", (event) => events.push(event)).on("error", reject).on("end", () => resolve(events));
  });
}

function refused(error) {
  const status = types["google.rpc.Status"].deserialize(error.metadata.get("grpc-status-details-bin")[0]);
  const found = {};
  for (const detail of status.details) {
    const name = detail.type_url.split(".").pop();
    found[name] = details.lookupType(name).toObject(details.lookupType(name).decode(detail.value));
  }
  return { code: error.code, message: error.details, details: found };
}

async function main() {
  const said = { unary: await unary(request), events: await streamed(request) };
  try {
    await unary({ items: [{ text: "a" }], parameters: { top_p: 2 } });
  } catch (error) {
    said.refused = refused(error);
  }
  client.close();
  process.stdout.write(JSON.stringify(said, (key, value) => (value?.type === "Buffer" ? value.data.length : value)));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
