// Clicks and keys of the review panel. A decision names the example that is on screen, and no other key counts until
// the answer is: a key pressed twice by haste can never decide about an example that nobody has seen.
let busy = 0;
let typed = '';

const panel = () => element.querySelector('.review');
const idle = () => Date.now() > busy;

function send(action, more) {
  if (!idle()) return;
  busy = Date.now() + 8000; // an answer that is lost must not lock the page
  element.classList.add('busy');
  const shown = panel();
  const where = shown ? {row: Number(shown.dataset.row), key: shown.dataset.key, seen: shown.dataset.seen} : {};
  trigger('submit', {action, ...where, ...more});
}

function choose(button) {
  const label = button.dataset.label;
  const more = {};
  if (label !== undefined) more.label = Number(label);
  if (button.dataset.act === 'go') more.to = Number(button.dataset.row);
  send(button.dataset.act, more);
}

function show(text) {
  typed = text;
  const output = element.querySelector('.typed');
  if (output) output.textContent = text ? `class ${text}… Enter, or one more digit` : '';
}

// With ten classes a digit is a class; with more, digits add up until only one class can be meant, or Enter is pressed.
function digit(key) {
  const classes = JSON.parse(panel().dataset.classes).map(String);
  const text = classes.some((one) => one.startsWith(typed + key)) ? typed + key : key;
  const possible = classes.filter((one) => one.startsWith(text));
  if (possible.length === 1 && possible[0] === text) relabel(text);
  else show(possible.length ? text : '');
}

function relabel(text) {
  show('');
  const button = element.querySelector(`.classes [data-label="${text}"]`);
  if (button && !button.disabled) send('relabel', {label: Number(text)});
}

const keys = {k: 'keep', r: 'relabel', d: 'drop', u: 'undo', ArrowRight: 'next', ArrowLeft: 'previous'};

function press(event) {
  const writing = event.target.closest('input, textarea, select, [contenteditable="true"]');
  if (writing || event.ctrlKey || event.altKey || event.metaKey || event.repeat || !element.offsetParent) return;
  if (!panel()) {
    if (event.key === 'ArrowLeft') send('last', {});
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (/^[0-9]$/.test(key)) digit(key);
  else if (key === 'Enter' && typed) relabel(typed);
  else if (key === 'Escape') show('');
  else if (key in keys) {
    const button = element.querySelector(`.actions [data-act="${keys[key]}"]`);
    if (button && !button.disabled) send(keys[key], {});
  } else return;
  event.preventDefault();
}

element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
  if (button && !button.disabled) choose(button);
});
window.upweightKeys?.abort(); // a panel that was drawn anew takes the keys over
window.upweightKeys = new AbortController();
document.addEventListener('keydown', press, {signal: window.upweightKeys.signal});
watch('value', () => {
  busy = 0;
  typed = '';
  element.classList.remove('busy');
});
