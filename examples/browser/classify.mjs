// Classifies the chosen files with model/model.onnx, an export of bfsys, in ONNX Runtime for browsers.
const PROGRAM = "model.onnx";
const SHOWN = 3; // classes of a file
const REMEDY = "write it with: bfsys export RUN examples/browser/model --format onnx";
const [model, files, answers] = ["model", "files", "answers"].map((name) => document.getElementById(name));

try {
  const ort = await import("./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs").catch(() => {
    throw new Error("ONNX Runtime cannot be loaded; fetch it with: npm install --prefix examples/browser");
  });
  ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
  ort.env.wasm.numThreads = 1; // more threads need HTTP headers that a plain file server does not send
  const description = await fetch("model/model.json");
  if (!description.ok) throw new Error(`there is no model/model.json; ${REMEDY}`);
  const about = await description.json();
  if (!about.files[PROGRAM]) throw new Error(`the export has no ${PROGRAM}; ${REMEDY}`);
  if (about.byte_transforms.length) {
    throw new Error(`this model reads bytes after ${about.byte_transforms.join(", ")}, which this page does not apply`);
  }
  const session = await ort.InferenceSession.create(`model/${PROGRAM}`, { executionProviders: ["wasm"] });
  model.textContent = `${about.run}: ${about.classes.length} classes`;
  files.disabled = false;
  files.addEventListener("change", async () => {
    const chosen = files.files;
    answers.replaceChildren();
    for (const file of chosen) {
      const answer = await classify(ort, session, about, file).catch((error) => `cannot be classified: ${error.message}`);
      if (files.files !== chosen) return; // other files have been chosen in the meantime
      const item = document.createElement("li");
      item.textContent = `${file.name}: ${answer}`;
      answers.append(item);
    }
  });
} catch (error) {
  model.textContent = `The model cannot be used: ${error.message}`;
}

async function classify(ort, session, about, file) {
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
