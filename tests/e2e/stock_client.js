// A client of grpc-js: `node stock_client.js ADDRESS DESCRIPTOR USER_ID METADATA TIMEOUT_MS`, prints what came of one Admit.

const fs = require("fs");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, descriptor, userId, key, timeoutMs] = process.argv.slice(2);
const definition = loader.loadFileDescriptorSetFromBuffer(fs.readFileSync(descriptor), { keepCase: true });
const { AdmissionService } = grpc.loadPackageDefinition(definition).september.admission.v1;
const client = new AdmissionService(address, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
metadata.set("x-platform-key", key);

client.Admit({ user_id: userId }, metadata, { deadline: Date.now() + Number(timeoutMs) }, (error, answer) => {
  const details = error && error.metadata.get("grpc-status-details-bin")[0];
  console.log(JSON.stringify({
    code: error ? error.code : 0,
    message: error ? error.details : "",
    details: details ? details.toString("base64") : "",
    engine_user_id: error ? "" : answer.engine.user_id,
  }));
  client.close();
});
