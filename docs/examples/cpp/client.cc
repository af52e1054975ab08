// A client with C++, gRPC and our .proto files, and nothing else of ours.
//
//   make && build/client 127.0.0.1:7001
//
// Prints one JSON object: a unary answer, the same streamed, and a refusal with its reason.
#include <google/protobuf/util/json_util.h>
#include <google/rpc/error_details.pb.h>
#include <google/rpc/status.pb.h>
#include <grpcpp/grpcpp.h>
#include <ostinato/v1/generation.grpc.pb.h>

#include <iostream>
#include <stdexcept>

using namespace ostinato::v1;

static std::string json(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.always_print_primitive_fields = true;
  options.preserve_proto_field_names = true;
  std::string text;
  if (!google::protobuf::util::MessageToJsonString(message, &text, options).ok()) throw std::runtime_error("no JSON");
  return text;
}

static void check(const grpc::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.error_message());
}

static std::string unary(Generation::Stub& stub, const GenerateRequest& request) {
  grpc::ClientContext context;
  GenerateResponse response;
  check(stub.Generate(&context, request, &response));
  return json(response);
}

static std::string streamed(Generation::Stub& stub, const GenerateRequest& request) {
  grpc::ClientContext context;
  GenerateEvent event;
  std::string events;
  auto reader = stub.GenerateStream(&context, request);
  while (reader->Read(&event)) events += (events.empty() ? "" : ",") + json(event);
  check(reader->Finish());
  return "[" + events + "]";
}

// What a program goes by: the reason, and which fields were bad. The message is for people.
static std::string refused(Generation::Stub& stub, const GenerateRequest& request) {
  grpc::ClientContext context;
  GenerateResponse response;
  const grpc::Status failed = stub.Generate(&context, request, &response);
  google::rpc::Status status;
  google::rpc::ErrorInfo info;
  google::rpc::BadRequest bad;
  status.ParseFromString(failed.error_details());
  for (const auto& detail : status.details()) detail.UnpackTo(&info) || detail.UnpackTo(&bad);
  std::string fields;
  for (const auto& violation : bad.field_violations()) fields += (fields.empty() ? "\"" : ",\"") + violation.field() + "\"";
  return "{\"code\":" + std::to_string(failed.error_code()) + ",\"reason\":\"" + info.reason() + "\",\"fields\":[" + fields + "]}";
}

int main(int, char** arguments) try {
  auto stub = Generation::NewStub(grpc::CreateChannel(arguments[1], grpc::InsecureChannelCredentials()));

  GenerateRequest request;
  request.add_items()->set_text("Shanghai is");
  auto* second = request.add_items();
  second->mutable_token_ids()->add_ids(83);
  second->mutable_token_ids()->add_ids(104);
  second->mutable_parameters()->set_seed(0);
  auto* parameters = request.mutable_parameters();
  parameters->set_seed(18446744073709551615u);
  parameters->set_temperature(0.7);
  parameters->set_max_new_tokens(8);
  parameters->set_ignore_eos(true);
  parameters->set_logprobs(2);

  GenerateRequest bad;
  bad.add_items()->set_text("a");
  bad.mutable_parameters()->set_top_p(2);

  std::cout << "{\"unary\":" << unary(*stub, request) << ",\"events\":" << streamed(*stub, request)
            << ",\"refused\":" << refused(*stub, bad) << "}\n";
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
