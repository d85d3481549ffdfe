// Drives llama.cpp through node-llama-cpp for tools/peers: one JSON object a line out, one command a line in.
// Prefill is the call that evaluates the prompt and gives the first token, decoding the calls for the others.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";
import readline from "node:readline";

const task = JSON.parse(process.argv[2]);
const say = (value) => process.stdout.write("PEER " + JSON.stringify(value) + "\n");
const {getLlama} = await import(pathToFileURL(createRequire(task.modules + "/").resolve("node-llama-cpp")));

const started = performance.now();
const llama = await getLlama({gpu: false, build: "never", maxThreads: task.threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: task.model});
const context = await model.createContext({
    contextSize: task.prompt.length + task.max_tokens + 8, sequences: task.batch, threads: task.threads, batchSize: 512
});
const sequences = Array.from({length: task.batch}, () => context.getSequence());
say({ready: true, open_ms: performance.now() - started, system: llama.systemInfo});

async function one(sequence, marks) {
    await sequence.clearHistory();
    let count = 0;
    for await (const _ of sequence.evaluate(task.prompt, {temperature: 0, yieldEogToken: true})) {
        count += 1;
        marks.push(performance.now());
        if (count === task.max_tokens) break;
    }
    if (count !== task.max_tokens) throw new Error(`got ${count} tokens, expected ${task.max_tokens}`);
}

for await (const line of readline.createInterface({input: process.stdin})) {
    if (line !== "run") break;
    const begin = performance.now();
    const marks = sequences.map(() => []);
    await Promise.all(sequences.map((sequence, index) => one(sequence, marks[index])));
    const first = Math.max(...marks.map((times) => times[0]));
    const end = Math.max(...marks.map((times) => times.at(-1)));
    say({prefill_s: (first - begin) / 1e3, decode_s: (end - first) / 1e3});
}
process.exit(0);
