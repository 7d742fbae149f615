// One subject of the page: its picture, the mask painted over it, and the query. Runs after
// page_upload.js, once for each card. The value is JSON of {name, image, mask, query}; "" = none.
// Its own event: "look" says that what is selected has changed.

const EMPTY = { name: "", image: "", mask: "", query: "" };
const INK = "rgb(255, 46, 147)";
const WAIT_MS = 450; // after a keystroke
const [canvas, brush, eraser, clear, query] = ["canvas", "brush", "eraser", "clear", "query"].map(part);
const pen = canvas.getContext("2d");
const mask = document.createElement("canvas"); // opaque where painted
const maskPen = mask.getContext("2d", { willReadFrequently: true });
let card = { ...EMPTY };
let picture = null;
let last = null; // of a stroke, in pixels of the picture
let cursor = null; // of the keyboard's brush
let timer = 0;
let turn = 0;

function tell(changes) {
  card = { ...card, ...changes };
  props.value = JSON.stringify(card);
}

function look() {
  clearTimeout(timer);
  trigger("look");
}

function decoded(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("not a picture"));
    image.src = url;
  });
}

// What the value says, after the page's server has changed it. After an upload it says nothing of
// the query, which may have been typed meanwhile.
async function show() {
  const mine = ++turn;
  tell({ ...EMPTY, query: card.query, ...JSON.parse(props.value || "{}") });
  if (query.value !== card.query) query.value = card.query;
  const image = card.image ? await decoded(card.image) : null;
  const painted = card.mask ? await decoded(card.mask) : null;
  if (mine !== turn) return;
  picture = image;
  cursor = null;
  note.textContent = "";
  drop.hidden = !!picture;
  stage.hidden = !picture;
  if (!picture) return;
  canvas.width = mask.width = picture.naturalWidth;
  canvas.height = mask.height = picture.naturalHeight;
  canvas.classList.toggle("small", Math.max(canvas.width, canvas.height) < 256);
  if (painted) {
    maskPen.drawImage(painted, 0, 0, mask.width, mask.height);
    const pixels = maskPen.getImageData(0, 0, mask.width, mask.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const on = pixels.data[i] > 127;
      pixels.data.set(on ? [255, 46, 147, 255] : [0, 0, 0, 0], i);
    }
    maskPen.putImageData(pixels, 0, 0);
  }
  paint();
}

function paint() {
  pen.imageSmoothingEnabled = false;
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  pen.globalAlpha = 0.6;
  pen.drawImage(mask, 0, 0);
  pen.globalAlpha = 1;
  if (cursor) {
    pen.strokeStyle = "white";
    pen.lineWidth = Math.max(1, canvas.width / 128);
    pen.strokeRect(cursor.x - width() / 2, cursor.y - width() / 2, width(), width());
  }
}

function width() {
  return Math.max(1, (brush.value / 100) * Math.max(mask.width, mask.height));
}

function stroke(from, to) {
  maskPen.globalCompositeOperation = eraser.checked ? "destination-out" : "source-over";
  maskPen.strokeStyle = INK;
  maskPen.lineWidth = width();
  maskPen.lineCap = maskPen.lineJoin = "round";
  maskPen.beginPath();
  maskPen.moveTo(from.x, from.y);
  maskPen.lineTo(to.x + 0.01, to.y); // a line of no length is not drawn
  maskPen.stroke();
  paint();
}

// The mask as it is sent: white where it is painted, black elsewhere, nothing between.
function maskUrl() {
  const sent = document.createElement("canvas");
  sent.width = mask.width;
  sent.height = mask.height;
  const pixels = maskPen.getImageData(0, 0, mask.width, mask.height);
  let any = false;
  for (let i = 0; i < pixels.data.length; i += 4) {
    const on = pixels.data[i + 3] > 127;
    any = any || on;
    pixels.data.set(on ? [255, 255, 255, 255] : [0, 0, 0, 255], i);
  }
  if (!any) return "";
  sent.getContext("2d").putImageData(pixels, 0, 0);
  return sent.toDataURL("image/png");
}

function painted() {
  tell({ mask: maskUrl() });
  look();
}

function at(event) {
  const box = canvas.getBoundingClientRect();
  return {
    x: ((event.clientX - box.left) / box.width) * canvas.width,
    y: ((event.clientY - box.top) / box.height) * canvas.height,
  };
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  event.preventDefault();
  canvas.setPointerCapture(event.pointerId);
  cursor = null;
  last = at(event);
  stroke(last, last);
});
canvas.addEventListener("pointermove", (event) => {
  if (!last) return;
  const here = at(event);
  stroke(last, here);
  last = here;
});
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => {
    if (!last) return;
    last = null;
    painted();
  });
}
canvas.addEventListener("keydown", (event) => {
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const way = ways[event.key];
  if (!way && event.key !== " ") return;
  event.preventDefault();
  cursor = cursor || { x: canvas.width / 2, y: canvas.height / 2 };
  if (way) {
    cursor.x = Math.min(canvas.width, Math.max(0, cursor.x + (way[0] * width()) / 2));
    cursor.y = Math.min(canvas.height, Math.max(0, cursor.y + (way[1] * width()) / 2));
    paint();
  } else {
    stroke(cursor, cursor);
    painted();
  }
});
canvas.addEventListener("blur", () => {
  if (!cursor) return;
  cursor = null;
  paint();
});
clear.addEventListener("click", () => {
  maskPen.clearRect(0, 0, mask.width, mask.height);
  paint();
  painted();
});

query.addEventListener("input", () => {
  tell({ query: query.value });
  clearTimeout(timer);
  timer = setTimeout(look, WAIT_MS);
});
query.addEventListener("keydown", (event) => {
  if (event.key === "Enter") look();
});

watch("value", () => show().then(() => card.image && look()));
show().then(() => card.image && look());
