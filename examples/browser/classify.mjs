// Classifies the chosen files with model/model.onnx, an export of bfsys, in ONNX Runtime for browsers.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more threads need HTTP headers that a plain file server does not send

const SHOWN = 3; // classes of a file
const [model, files, answers] = ["model", "files", "answers"].map((name) => document.getElementById(name));

try {
  const about = await (await fetch("model/model.json")).json();
  const session = await ort.InferenceSession.create("model/model.onnx", { executionProviders: ["wasm"] });
  model.textContent = `${about.run}: ${about.classes.length} classes`;
  if (about.byte_transforms.length) {
    throw new Error(`this model reads bytes after ${about.byte_transforms.join(", ")}, which this page does not apply`);
  }
  files.disabled = false;
  files.addEventListener("change", async () => {
    answers.replaceChildren();
    for (const file of files.files) {
      const item = document.createElement("li");
      item.textContent = `${file.name}: ${await classify(session, about, file)}`;
      answers.append(item);
    }
  });
} catch (error) {
  model.textContent = `The model cannot be used: ${error.message}`;
}

async function classify(session, about, file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (bytes.length < about.least_bytes) {
    return `has ${bytes.length} bytes; this model needs at least ${about.least_bytes}`;
  }
  const { probabilities } = await session.run({ bytes: new ort.Tensor("uint8", bytes, [bytes.length]) });
  return [...probabilities.data]
    .map((probability, index) => ({ probability, name: about.classes[index] }))
    .sort((a, b) => b.probability - a.probability)
    .slice(0, SHOWN)
    .map(({ probability, name }) => `${name} ${(100 * probability).toFixed(1)} %`)
    .join("   ");
}
