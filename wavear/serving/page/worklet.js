// Plays blocks as they come, and counts what was heard; `recorder` passes the microphone on.
class Player extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.start = options.processorOptions.start; // samples to hold before sound begins
    this.underruns = this.calls = 0;
    this.playing = false;
    this.now = { epoch: -1, blocks: [], first: 0, held: 0, heard: 0, ended: false };
    this.next = null; // the stream went back: `now` plays on until enough of this is here
    this.port.onmessage = ({ data: { epoch, position, samples } }) => {
      if (epoch !== (this.next ?? this.now).epoch) {
        this.next = { epoch, blocks: [], first: 0, held: 0, heard: position, ended: false };
      }
      const stream = this.next ?? this.now;
      if (!samples.length) stream.ended = true;
      stream.blocks.push(samples);
      stream.held += samples.length;
    };
  }

  process(_, [[out]]) {
    if (this.next && this.enough(this.next)) {
      this.now = this.next;
      this.next = null;
    }
    const now = this.now;
    this.playing ||= this.enough(now);
    let n = 0;
    while (this.playing && n < out.length && now.blocks.length) {
      const part = now.blocks[0].subarray(now.first, now.first + out.length - n);
      out.set(part, n);
      n += part.length;
      now.first += part.length;
      if (now.first === now.blocks[0].length) {
        now.blocks.shift();
        now.first = 0;
      }
    }
    now.heard += n;
    now.held -= n;
    if (this.playing && n < out.length && !now.ended) {
      this.underruns += 1;
      this.playing = false;
    }
    if (++this.calls % 8 === 0) {
      const { epoch, heard, held } = now;
      const ended = now.ended && !held && !this.next;
      this.port.postMessage({ epoch, heard, held, ended, underruns: this.underruns });
    }
    return true;
  }

  enough(stream) {
    return stream.ended || stream.held >= this.start;
  }
}

class Recorder extends AudioWorkletProcessor {
  process([[input]]) {
    if (input) this.port.postMessage(input.slice());
    return true;
  }
}

registerProcessor("player", Player);
registerProcessor("recorder", Recorder);
