const $ = (id) => document.getElementById(id);
const LONGEST = 30 * 60; // seconds of live audio that are kept for the download
const about = await (await fetch("about")).json();

function show(id, text, failed = false) {
  $(id).textContent = text;
  $(id).classList.toggle("error", failed);
}

function fromBase64(text) {
  return new Int16Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

function toFloat(pcm) {
  return Float32Array.from(pcm, (x) => x / 32768);
}

function joined(blocks, length) {
  const all = new Int16Array(length);
  let at = 0;
  for (const block of blocks) {
    if (at >= length) break;
    all.set(block.subarray(0, length - at), at);
    at += block.length;
  }
  return all;
}

function wav(pcm, rate) {
  const head = new DataView(new ArrayBuffer(44));
  const tag = (at, text) => [...text].forEach((c, i) => head.setUint8(at + i, c.charCodeAt(0)));
  const bytes = pcm.length * 2;
  tag(0, "RIFF"); head.setUint32(4, 36 + bytes, true); tag(8, "WAVEfmt "); head.setUint32(16, 16, true);
  head.setUint16(20, 1, true); head.setUint16(22, 1, true); head.setUint32(24, rate, true);
  head.setUint32(28, rate * 2, true); head.setUint16(32, 2, true); head.setUint16(34, 16, true);
  tag(36, "data"); head.setUint32(40, bytes, true);
  return new Blob([head, pcm], { type: "audio/wav" });
}

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

async function post(address, body) {
  const answer = await fetch(address, { method: "POST", body });
  const found = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (!answer.ok) throw new Error(found.error);
  return found;
}

let context = null;
async function sound() { // a click must come first, browsers want it
  if (!context) {
    context = new AudioContext({ sampleRate: about.rate, latencyHint: "interactive" });
    await context.audioWorklet.addModule("worklet.js");
  }
  await context.resume();
  return context;
}

// ---- the model

$("model").textContent = `${about.name}, ${about.family}, ${about.rate} Hz`;
$("speak-note").textContent = about.speak;
$("text").disabled = $("speak-button").disabled = !about.speaks;
$("top-p-label").hidden = !about.truncates;
for (const label of document.querySelectorAll(".speakers")) {
  label.hidden = !about.speakers.length;
  label.querySelector("select").append(...about.speakers.map((name) => new Option(name)));
}
for (const slider of document.querySelectorAll("input[type=range]")) {
  slider.addEventListener("input", () => { slider.nextElementSibling.value = slider.value; });
}
show("upload-status", `At most ${about.limits}.`);
if (about.mel) {
  $("use-label").textContent = "follow the recording, again and again";
  $("use-recording").checked = true;
  $("use-recording").disabled = true;
  $("live-note").textContent = "This model follows a recording: choose one above.";
} else {
  $("resynthesize-note").textContent = "This model makes audio by itself: see Live.";
}

// ---- a recording

let original = null; // {id, pcm, seconds, top}
let synthesis = null;

async function upload(blob, name) {
  stopBoth();
  show("upload-status", "Reading…");
  try {
    const found = await post(`recordings?name=${encodeURIComponent(name)}`, blob);
    original = { ...found, pcm: fromBase64(found.pcm), name };
    synthesis = null;
    $("original-picture").src = `data:image/png;base64,${found.spectrogram}`;
    $("synthesis-picture").removeAttribute("src");
    show("upload-status", `${name}, ${found.seconds.toFixed(2)} s`);
    show("r-status", "");
    $("synthesize").disabled = !about.mel;
    $("both").disabled = false;
    $("save").disabled = true;
    if (about.mel) $("live-note").textContent = "";
    $("play").disabled = false;
  } catch (error) {
    show("upload-status", error.message, true);
  }
}

$("file").onchange = () => $("file").files[0] && upload($("file").files[0], $("file").files[0].name);
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    if (name === "drop" && event.dataTransfer.files[0]) {
      upload(event.dataTransfer.files[0], event.dataTransfer.files[0].name);
    }
  });
}

let microphone = null;
$("record").onclick = async () => {
  if (microphone) {
    const { stream, own, parts } = microphone;
    microphone = null;
    $("record").textContent = "Record";
    stream.getTracks().forEach((track) => track.stop());
    const rate = own.sampleRate;
    await own.close();
    const pcm = parts.map((part) => Int16Array.from(part, (x) => Math.max(-32768, Math.min(32767, Math.round(x * 32768)))));
    await upload(wav(joined(pcm, pcm.reduce((sum, part) => sum + part.length, 0)), rate), "microphone.wav");
    return;
  }
  try {
    const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    const stream = await navigator.mediaDevices.getUserMedia({ audio });
    const own = new AudioContext();
    await own.audioWorklet.addModule("worklet.js");
    const node = new AudioWorkletNode(own, "recorder", { numberOfOutputs: 0 });
    microphone = { stream, own, parts: [] };
    node.port.onmessage = ({ data }) => microphone?.parts.push(data);
    own.createMediaStreamSource(stream).connect(node);
    $("record").textContent = "Stop";
    show("upload-status", "Recording…");
  } catch (error) {
    show("upload-status", `no microphone: ${error.message}`, true);
  }
};

// ---- resynthesize

$("synthesize").onclick = async () => {
  $("synthesize").disabled = true;
  show("r-status", "Synthesizing…");
  try {
    const asked = { id: original.id, top: original.top, seed: +$("r-seed").value, temperature: +$("r-temperature").value, particles: +$("r-particles").value };
    if (about.speakers.length) asked.speaker = $("r-speaker").value;
    const found = await post("resynthesize", JSON.stringify(asked));
    stopBoth();
    synthesis = { pcm: fromBase64(found.pcm), seed: asked.seed };
    $("synthesis-picture").src = `data:image/png;base64,${found.spectrogram}`;
    show("r-status", [`${found.real_time_factor.toFixed(1)} × real time`, ...found.findings].join("; "));
    document.querySelector("[name=side][value=synthesis]").checked = true;
    $("save").disabled = false;
  } catch (error) {
    show("r-status", error.message, true);
  }
  $("synthesize").disabled = false;
};
$("save").onclick = () => download(wav(synthesis.pcm, about.rate), `synthesis-seed${synthesis.seed}.wav`);

// Both sides run in step from one start time; the choice only moves the gains.
let both = null;
function stopBoth() {
  both?.sources.forEach((source) => { source.onended = null; source.stop(); });
  both = null;
  $("both").textContent = "Play";
  document.querySelectorAll("figure i").forEach((line) => { line.style.display = "none"; });
}
function balance() {
  const side = document.querySelector("[name=side]:checked").value;
  both?.gains.forEach((gain, i) => { gain.gain.value = Number((side === "original") === (i === 0)); });
}
$("both").onclick = async () => {
  if (both) return stopBoth();
  const audio = await sound();
  const began = audio.currentTime + 0.05;
  both = { sources: [], gains: [] };
  for (const side of [original, synthesis].filter(Boolean)) {
    const buffer = audio.createBuffer(1, side.pcm.length, about.rate);
    buffer.copyToChannel(toFloat(side.pcm), 0);
    const source = new AudioBufferSourceNode(audio, { buffer });
    const gain = audio.createGain();
    source.connect(gain).connect(audio.destination);
    source.start(began);
    both.sources.push(source);
    both.gains.push(gain);
  }
  if (!synthesis) document.querySelector("[name=side][value=original]").checked = true;
  balance();
  both.sources[0].onended = stopBoth;
  $("both").textContent = "Stop";
  const line = () => {
    if (!both) return;
    const share = Math.max(0, audio.currentTime - began) / original.seconds;
    document.querySelectorAll("figure i").forEach((mark) => {
      // The axes of the picture lie inside it: about 8 % at the left, 1 % at the right.
      mark.style.display = "block";
      mark.style.left = `${8 + 91 * Math.min(share, 1)}%`;
    });
    requestAnimationFrame(line);
  };
  line();
};
document.querySelectorAll("[name=side]").forEach((choice) => { choice.onchange = balance; });

// ---- live

let live = null;
let played = null; // what the last stream left: {blocks, heard}
$("play").disabled = about.mel;

function settings() {
  const asked = { temperature: +$("temperature").value };
  if (about.truncates && +$("top-p").value < 1) asked.top_p = +$("top-p").value;
  return asked;
}

function quoted(text) { // for a shell: names of files and checkpoints are not trusted
  return /^[\w./:-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function command() {
  const { begun, changed, heard } = played;
  if (about.mel || changed || !heard) return "";
  const words = [`wavear generate ${quoted(about.name)}`, `--seconds ${(heard / about.rate).toFixed(6)}`, `--seed ${begun.seed}`];
  words.push(`--temperature ${begun.temperature}`);
  if (begun.top_p) words.push(`--top-p ${begun.top_p}`);
  if (begun.speaker !== undefined) words.push(`--speaker ${about.speakers.indexOf(begun.speaker)}`);
  if (begun.recording) words.push(`--prime ${quoted(original.name)}`);
  return [...words, "--out live.wav"].join(" ");
}

function stopLive(message = "", failed = false) {
  if (!live) return;
  live.socket.onclose = null;
  live.socket.close();
  live.node.disconnect();
  live.button.textContent = live.label;
  live = null;
  $("mark").disabled = true;
  $("marks").replaceChildren();
  $("command").textContent = command();
  show("live-status", message, failed);
}

function send(message) {
  live?.socket.send(JSON.stringify(message));
}

async function start(button, source) {
  if (live) return stopLive();
  const audio = await sound();
  const begun = { seed: +$("seed").value, ...settings(), ...source };
  if (about.speakers.length) begun.speaker = $("speaker").value;
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`);
  socket.binaryType = "arraybuffer";
  const options = { outputChannelCount: [1], numberOfInputs: 0, processorOptions: { start: Math.round(about.rate * about.buffer / 2) } };
  const node = new AudioWorkletNode(audio, "player", options);
  node.connect(audio.destination);
  live = { socket, node, button, label: button.textContent, epoch: 0, seed: begun.seed, waiting: [] };
  played = { begun, blocks: [], length: 0, heard: 0, changed: false, full: false };
  button.textContent = "Stop";
  $("command").textContent = "";
  show("live-status", "Connecting…");
  socket.onopen = () => socket.send(JSON.stringify(begun));
  socket.onclose = () => stopLive("the server closed the connection", true);
  socket.onmessage = ({ data }) => (typeof data === "string" ? receive(JSON.parse(data)) : receiveAudio(data));
  node.port.onmessage = ({ data }) => live?.node === node && meter(data, audio);
}
$("play").onclick = () => start($("play"), $("use-recording").checked && original ? { recording: original.id } : {});
$("speak-button").onclick = () => start($("speak-button"), { text: $("text").value });

function receiveAudio(data) {
  const [epoch, position] = [0, 4].map((at) => new DataView(data).getUint32(at, true));
  const pcm = new Int16Array(data, 8);
  if (epoch !== live.epoch) { // blocks begin where marks are: whole blocks are dropped
    live.epoch = epoch;
    while (played.length > position) played.length -= played.blocks.pop().length;
    played.heard = position;
  }
  if (played.length < LONGEST * about.rate) {
    played.blocks.push(pcm);
    played.length += pcm.length;
  } else if (!played.full) {
    played.full = true;
    show("live-status", `The download holds the first ${LONGEST / 60} minutes.`);
  }
  const samples = toFloat(pcm); // none at the end
  live.node.port.postMessage({ epoch, position, samples }, [samples.buffer]);
}

function receive(message) {
  if (message.error) {
    stopLive(message.error, true);
  } else if (message.started) {
    show("live-status", "Playing");
    $("mark").disabled = false;
    $("download").disabled = false;
    addMark(0, "start");
  } else if (message.mark !== undefined) {
    addMark(message.mark, `${(message.position / about.rate).toFixed(1)} s`);
  } else if (message.changed !== undefined) {
    const change = live.waiting.find((one) => one.position === undefined);
    if (change) change.position = message.changed;
  } else if (message.back !== undefined) {
    live.seed = message.seed;
    for (const [id, value] of [["seed", message.seed], ["temperature", message.temperature], ["top-p", message.top_p ?? 1]]) {
      $(id).value = value;
      if ($(id).nextElementSibling) $(id).nextElementSibling.value = value;
    }
  }
}

function addMark(number, name) {
  const item = document.createElement("li");
  item.append(name);
  for (const [text, message] of [
    ["go back", () => ({ back: number })],
    ["fork", () => ({ back: number, seed: +$("seed").value })],
  ]) {
    const button = document.createElement("button");
    button.textContent = text;
    button.title = text === "fork" ? "continue from here with the seed above" : "the same samples again";
    button.onclick = () => {
      if (text === "fork") {
        played.changed = true;
        if (+$("seed").value === live.seed) $("seed").value = live.seed + 1;
      }
      live.waiting = [];
      send(message());
    };
    item.append(button);
  }
  $("marks").append(item);
  while ($("marks").children.length > 16) $("marks").children[0].remove();
}

function meter({ epoch, heard, held, underruns, ended }, audio) {
  if (live.socket.readyState !== WebSocket.OPEN || epoch !== live.epoch) return;
  send({ heard, epoch });
  played.heard = heard;
  $("played").textContent = `${(heard / about.rate).toFixed(1)} s`;
  $("buffer").textContent = `${Math.round((held / about.rate) * 1000)} ms`;
  $("underruns").textContent = underruns;
  if (ended) return stopLive(`Spoken: ${(heard / about.rate).toFixed(1)} s`);
  if (live.waiting.length && heard >= live.waiting[0].position) {
    const milliseconds = performance.now() - live.waiting.shift().at + (audio.outputLatency || 0) * 1000;
    $("latency").textContent = `${Math.round(milliseconds)} ms`;
  }
}

$("mark").onclick = () => send({ mark: true });
for (const id of ["temperature", "top-p"]) {
  $(id).addEventListener("change", () => {
    if (!live) return;
    played.changed = true;
    live.waiting.push({ at: performance.now() });
    send({ temperature: +$("temperature").value, top_p: about.truncates && +$("top-p").value < 1 ? +$("top-p").value : null });
  });
}
$("download").onclick = () => {
  const length = Math.min(played.heard, played.length);
  download(wav(joined(played.blocks, length), about.rate), `live-seed${played.begun.seed}.wav`);
  $("command").textContent = command();
};
window.wavear = { about, samples: () => joined(played.blocks, Math.min(played.heard, played.length)) };
