// A page that is opened from a folder cannot start a worker, and the search is one: here it runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      const script = document.createElement("script");
      script.src = new URL(url, location.href);
      // The script takes its frame for a worker's `self`. As between threads, each message is a copy, and arrives after what runs now.
      this.ready = new Promise((resolve) => {
        this.frame.onload = () => {
          const inside = this.frame.contentWindow;
          inside.postMessage = (data) => this.deliver(this, data);
          script.onload = () => resolve(inside);
          inside.document.head.append(script);
        };
      });
      this.frame.srcdoc = "<!doctype html>";
      document.body.append(this.frame);
    }

    deliver(receiver, data) {
      const copy = structuredClone(data);
      setTimeout(() => receiver.onmessage?.(new MessageEvent("message", { data: copy })));
    }

    postMessage(data) {
      const copy = structuredClone(data);
      this.ready.then((inside) => this.deliver(inside, copy));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
