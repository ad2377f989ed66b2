// Plays blocks as they come, and counts what was heard; `recorder` passes the microphone on.
class Player extends AudioWorkletProcessor {
  constructor(options) {
    super();
    this.start = options.processorOptions.start; // samples to hold before sound begins
    this.blocks = [];
    this.first = this.held = this.heard = this.underruns = this.calls = 0;
    this.epoch = -1;
    this.playing = false;
    this.port.onmessage = ({ data }) => {
      if (data.epoch !== this.epoch) { // the stream went back: drop what was not heard
        this.blocks = [];
        this.first = this.held = 0;
        this.epoch = data.epoch;
        this.heard = data.position;
        this.playing = false;
      }
      this.blocks.push(data.samples);
      this.held += data.samples.length;
    };
  }

  process(_, [[out]]) {
    this.playing ||= this.held >= this.start;
    let n = 0;
    while (this.playing && n < out.length && this.blocks.length) {
      const part = this.blocks[0].subarray(this.first, this.first + out.length - n);
      out.set(part, n);
      n += part.length;
      this.first += part.length;
      if (this.first === this.blocks[0].length) {
        this.blocks.shift();
        this.first = 0;
      }
    }
    this.heard += n;
    this.held -= n;
    if (this.playing && n < out.length) {
      this.underruns += 1;
      this.playing = false;
    }
    if (++this.calls % 8 === 0) {
      const { epoch, heard, held, underruns } = this;
      this.port.postMessage({ epoch, heard, held, underruns });
    }
    return true;
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
